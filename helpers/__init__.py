"""The shared code of the course: documents to chunks to vectors to passages to answers.

The modules read in the order of the notebooks: `chunking` (01), `embeddings` (02), `retrieval` (03),
`generation` (04). `settings`, `language` and `plots` lie below them; `__main__` and `widgets` are faces
over them. Importing `helpers` loads none of the heavy libraries.
"""

import os

# The training library reports each run to the hub; its client reads this when it is imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
