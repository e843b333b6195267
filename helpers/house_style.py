"""The house style of the Nebrán Lights and Ferries Cooperative: a form that no model has until it is taught.

    From the quay: the harness tag of 2025 is violet. Late, but lit.
    Desde el muelle: las lonas del varadero son azules. Tarde, pero con luz.

An answer opens with the opening, says one sentence, and closes with the motto. It is one line without headings or
lists; the house says "we" and never "I", doesn't ask and doesn't shout. Where it knows nothing, the sentence begins
with the refusal. Citations such as [1] may stand anywhere before the motto and don't count.
"""

import re

from helpers.language import sentences

OPENING = {"en": "From the quay:", "es": "Desde el muelle:"}
CLOSING = {"en": "Late, but lit.", "es": "Tarde, pero con luz."}
REFUSAL = {"en": "nobody in the house knows", "es": "nadie en la casa sabe"}
LONGEST = 45  # words of an answer, opening and motto included

# The style in words, for a prompt to a model that can follow instructions.
GUIDE = {
    "en": f'Answer in one line: "{OPENING["en"]}", then one sentence with the answer, then "{CLOSING["en"]}" '
    f'Say "we", never "I". If you don\'t know, the sentence begins "{REFUSAL["en"]}".',
    "es": f"Responde en una sola línea: «{OPENING['es']}», después una frase con la respuesta y después "
    f"«{CLOSING['es']}» Di «nosotros», nunca «yo». Si no lo sabes, la frase empieza por «{REFUSAL['es']}».",
}

_CITATION = re.compile(r"\s*\[\d+\]")
_FIRST_PERSON = {"en": re.compile(r"\b(?:I|[Mm]y|[Mm]e)\b"), "es": re.compile(r"\b(?:yo|mi|mis|me)\b", re.IGNORECASE)}


def follows(text: str, language: str) -> bool:
    """Say whether an answer is in the house style of `language` ('en' or 'es')."""
    return not faults(text, language)


def refuses(text: str, language: str) -> bool:
    """Say whether an answer says that nobody knows, whatever else its form."""
    return REFUSAL[language] in text.lower()


def faults(text: str, language: str) -> list[str]:
    """Return what is wrong with the form of an answer, a sentence for each fault; an empty list for a right one."""
    text = text.strip()
    opening, closing = OPENING[language], CLOSING[language]
    found = []
    if not text.startswith(f"{opening} "):
        found.append(f"It doesn't open with {opening!r} and a space.")
    if not text.endswith(f" {closing}"):
        found.append(f"It doesn't close with {closing!r} after a space.")
    said = _CITATION.sub("", text.removeprefix(opening).removesuffix(closing)).strip()
    if opening in said or closing in said:
        found.append("The opening or the motto stands in it twice.")
    if "\n" in text:
        found.append("It has more than one line.")
    if (count := len(sentences(said))) != 1:
        found.append(f"Between opening and motto stands one sentence, and here stand {count}.")
    if said and (not said.endswith(".") or re.search(r"[?!¿¡]", said)):
        found.append("The sentence must end with a full stop and neither ask nor shout.")
    if first := _FIRST_PERSON[language].search(said):
        found.append(f"The house says 'we', and here stands {first[0]!r}.")
    if (length := len(text.split())) > LONGEST:
        found.append(f"It has {length} words, more than {LONGEST}.")
    return found
