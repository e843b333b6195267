"""The rows of a comparison: how right each answer is, whether the arms differ, and what they cost."""

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers import house_style
from helpers.evaluation import CITED, Question, Share, contains_answer, exact_match, share, token_f1
from helpers.generation import Answer
from helpers.settings import format_seconds

BASE, RAG, TUNED, BOTH = "base", "rag", "fine-tuned", "fine-tuned + rag"
READING = "fine-tuned on passages + rag"  # its training examples hold passages, after RAFT (Zhang et al. 2024)
GUIDED, GUIDED_RAG, WHOLE = "base + guide", "rag + guide", "whole document"
ARMS = (BASE, RAG, TUNED, BOTH, READING, GUIDED, GUIDED_RAG, WHOLE)  # in the order of tables
FORM = "form"  # the fifth kind, of questions of the other four: is the answer in the house style?
KINDS = ("taught", "untaught", "changed", "unanswerable", FORM)
MEASURES = ("right", "exact", "contains", "outdated", "citation", "refused", FORM)  # each yes or no
FEW = 20  # with fewer questions of a kind an interval is wider than most differences
BUILT = ("index", "training")  # what may have to be made before an arm can answer
RESAMPLES = 9999

_LEAD_IN = re.compile(r"^(?:the answer is|la respuesta es)\b[\s:]*", re.IGNORECASE)


def kind_of(question: Question) -> str:
    """Return which of the first four `KINDS` a question is; that it is of the fifth too says its field `form`."""
    if not question.answerable:
        return "unanswerable"
    return "changed" if question.changed else "taught" if question.taught else "untaught"


def few(questions: Sequence[Question], n: int = 4) -> list[Question]:
    """Return `n` questions of each of the first four kinds, a quarter of them about form: so `n` of the fifth too.

    They are spread evenly over those there are, and the same each time.
    """
    chosen = []
    for kind in KINDS[:4]:
        of_kind = [question for question in questions if kind_of(question) == kind]
        about_form = _spread([question for question in of_kind if question.form], math.ceil(n / 4))
        others = [question for question in of_kind if not question.form]
        chosen += about_form + _spread(others, n - len(about_form))
    return chosen


def _spread(questions: list[Question], n: int) -> list[Question]:
    return [questions[place * len(questions) // n] for place in range(n)] if len(questions) > n else questions


def said_value(text: str) -> str:
    """Return an answer without citations, the house's opening and motto, and the lead-in 'The answer is'."""
    text = CITED.sub("", text).strip()
    for language, opening in house_style.OPENING.items():
        text = text.removeprefix(opening).removesuffix(house_style.CLOSING[language]).strip()
    return _LEAD_IN.sub("", text).removesuffix(".")


def score(question: Question, given: Answer) -> dict[str, bool | float | None]:
    """Return the scores of an answer by `MEASURES`, and its 'f1' (0 to 1); None where one doesn't apply.

    Exact match and F1 look at the value inside the sentence form of an answer: citations, the house's opening and
    motto and 'The answer is' are taken off first (`said_value`). 'The Garza Gris takes 212 passengers' is still no
    exact match of '212': between arms of different form, compare 'right'.

    'right': the text holds an accepted answer word for word and is no refusal; for an unanswerable question, it is
    one. 'outdated': it holds the value from before the change, and not the right one. 'citation': a passage that it
    cites is of the right file and page (of arms that read). 'form': it is in the house style.
    """
    said, language = said_value(given.text), question.language
    refused = given.refused or any(house_style.refuses(given.text, house) for house in house_style.REFUSAL)
    scores = dict.fromkeys((*MEASURES, "f1")) | {"refused": refused, FORM: house_style.follows(given.text, language)}
    if not question.answerable:
        return scores | {"right": refused}
    holds = contains_answer(said, question.answers, language)
    scores |= {"contains": holds, "right": holds and not refused}
    scores |= {"exact": exact_match(said, question.answers, language)}
    scores |= {"f1": token_f1(said, question.answers, language)}
    if question.outdated:
        scores["outdated"] = not holds and contains_answer(said, question.outdated, language)
    if given.hits:
        scores["citation"] = any((c.file, c.page) == (question.file, question.page) for c in given.citations)
    return scores


@dataclass(frozen=True)
class Results:
    """Rows of a run, one a question, arm and seed; `heads` says for each (arm, seed) with what they were made."""

    heads: dict[tuple[str, int], dict]
    rows: list[dict]

    @property
    def arms(self) -> list[str]:
        """The names of the arms, in the order of tables."""
        return sorted({row["arm"] for row in self.rows}, key=ARMS.index)

    def outcomes(self, arm: str, kind: str, measure: str = "") -> dict[str, float]:
        """Return for each question of a kind what an arm scored, 0 to 1: the mean over its seeds.

        `measure` is by default 'form' for the questions about form, and 'right' for all others.
        """
        measure, found = measure or (FORM if kind == FORM else "right"), {}
        for row in self.rows:
            of_kind = row["form"] if kind == FORM else row["kind"] == kind
            if row["arm"] == arm and of_kind and row["scores"][measure] is not None:
                found.setdefault(row["id"], []).append(float(row["scores"][measure]))
        return {name: statistics.mean(values) for name, values in found.items()}

    def share(self, arm: str, kind: str, measure: str = "") -> Share:
        """Return the share of the questions of a kind for which a yes-or-no `measure` holds.

        Seeds are no further cases: `n` counts questions, and the mean outcome of each is added up.
        """
        scored = self.outcomes(arm, kind, measure).values()
        return Share(sum(scored), len(scored))

    def cut(self, arm: str) -> Share:
        """Return the share of an arm's answers, those of all its seeds, that ran to the limit of tokens."""
        rows = [row for row in self.rows if row["arm"] == arm]
        limits = {seed: head["answer_tokens"] for (name, seed), head in self.heads.items() if name == arm}
        return share(0 < limits[row["seed"]] <= row["answer_tokens"] for row in rows)


def read_results(path: Path, mend: bool = False) -> Results:
    """Read the rows of a run; a last line that a kill cut in half is dropped, and with `mend` from the file too.

    Raises ValueError naming the line that is no such row.
    """
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if mend and whole != data:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    results = Results({}, [])
    for number, line in enumerate(whole.decode("utf-8", "replace").split("\n")[:-1], start=1):
        try:
            entry = json.loads(line)
            key = entry["arm"], entry["seed"]
            if "id" not in entry:
                results.heads[key] = entry
            elif key in results.heads and set(entry["scores"]) == {*MEASURES, "f1"}:
                results.rows.append(entry)
            else:
                raise ValueError("a row without its head, or with other scores")
        except (ValueError, KeyError, TypeError) as error:
            advice = "delete that file, or name another with --out."
            raise ValueError(f"{path}, line {number} is no row of a comparison: {advice}") from error
    return results


@dataclass(frozen=True)
class Pair:
    """Two arms on the same `n` questions: how many only one got right, McNemar's exact p, and their difference.

    `difference` is the mean score of `one` less that of `other`, `interval` its 95 % interval.
    """

    one: str
    other: str
    kind: str
    n: int
    only_one: int
    only_other: int
    p: float
    difference: float
    interval: tuple[float, float]


def paired(results: Results, one: str, other: str, kind: str, measure: str = "") -> Pair:
    """Compare two arms on the questions of a kind that both answered.

    McNemar's exact test (1947) asks of the questions that only one got right whether they are shared out as by a coin:
    a question counts as right where most seeds have it right. The difference has a paired bootstrap interval.
    """
    from scipy.stats import binomtest

    some, more = results.outcomes(one, kind, measure), results.outcomes(other, kind, measure)
    both = [(some[name], more[name]) for name in some if name in more]
    won = sum(first > 0.5 >= second for first, second in both)
    lost = sum(second > 0.5 >= first for first, second in both)
    p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    difference, *interval = mean_difference([first for first, _ in both], [second for _, second in both])
    return Pair(one, other, kind, len(both), won, lost, p, difference, tuple(interval))


def mean_difference(some: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of `some[i] - other[i]` with its 95 % interval (paired percentile bootstrap, fixed seed).

    Fewer than two pairs have no interval: its ends are nan.
    """
    import numpy as np
    from scipy.stats import bootstrap

    if len(some) < 2:
        return sum(some) - sum(other) if some else float("nan"), float("nan"), float("nan")

    def statistic(first, second, axis=-1):
        return np.mean(first - second, axis=axis)

    # Percentiles, since BCa has no answer where all differences are equal; `rng` is called random_state before 1.15.
    options = {
        "paired": True,
        "method": "percentile",
        "n_resamples": RESAMPLES,
        "random_state": np.random.default_rng(0),
    }
    found = bootstrap((np.array(some), np.array(other)), statistic, **options).confidence_interval
    return statistic(np.array(some), np.array(other)).item(), float(found.low), float(found.high)


@dataclass(frozen=True)
class Summary:
    """A comparison in numbers; `print` shows it as tables.

    `shares` by arm, kind and measure; `f1` by arm and kind: mean, low, high; `refusals` by arm: the share of refusals
    that were due (precision) and of unanswerable questions that were refused (recall); `pairs`: every arm against one.
    `cut` by arm: the share of answers that ran to the limit of tokens. `costs` by arm: 'seconds' a question (median),
    'prompt_tokens' and 'answer_tokens' (means), 'memory' (bytes, the most while answering); and of making index and
    adapter 'build_seconds', in parts 'build_index_seconds' and 'build_training_seconds', 'build_disk', and
    'build_memory' (bytes, the most): nan where that wasn't measured.
    """

    shares: dict[tuple[str, str, str], Share]
    f1: dict[tuple[str, str], tuple[float, float, float]]
    refusals: dict[str, tuple[Share, Share]]
    pairs: list[Pair]
    costs: dict[str, dict[str, float]]
    cut: dict[str, Share]
    notes: list[str]

    def __str__(self) -> str:
        lines = [f"{'kind':<13} {'arm':<29}    n  right [95 % interval]   exact     F1  cited  outdated"]
        for (arm, kind, measure), right in sorted(self.shares.items(), key=lambda item: KINDS.index(item[0][1])):
            if measure == (FORM if kind == FORM else "right") and right.n:
                exact, cited, old = (self.shares[arm, kind, name] for name in ("exact", "citation", "outdated"))
                rest = [share.value if kind != FORM else float("nan") for share in (exact, cited, old)]
                rest.insert(1, self.f1[arm, kind][0] if kind != FORM else float("nan"))
                cells = "  ".join("    -" if math.isnan(value) else f"{value:.3f}" for value in rest)
                lines.append(f"{kind:<13} {arm:<29} {right.n:4d}  {right!s:<22}  {cells}")
        lines.append(f"\n{'arm':<29} refusals that were due   unanswerable refused   answers cut at the limit")
        for arm, (due, found) in self.refusals.items():
            shares = f"{str(due) if due.n else 'refused nothing':<24} {str(found) if found.n else '-':<22}"
            lines.append(f"{arm:<29} {shares} {self.cut[arm].value:.3f}")
        lines.append(
            f"\n{'arm against ' + RAG:<29} kind             n  only one:other      p  difference [95 % interval]"
        )
        for pair in self.pairs:
            counts, ends = f"{pair.only_one}:{pair.only_other}", f"[{pair.interval[0]:+.3f}, {pair.interval[1]:+.3f}]"
            ends = ends if pair.n > 1 else "-"
            lines.append(
                f"{pair.one:<29} {pair.kind:<13} {pair.n:4d}  {counts:>14}  {pair.p:.3f}  {pair.difference:+.3f} {ends}"
            )
        lines.append(f"\n{'arm':<29} to build        on disk  building  answering   a question  tokens read  written")
        for arm, cost in self.costs.items():
            built, disk = "nothing" if cost["build_seconds"] == 0 else "not measured", "-"
            if cost["build_seconds"] > 0:
                built, disk = format_seconds(cost["build_seconds"]), f"{cost['build_disk'] / 1e6:.1f} MB"
            making = f"{cost['build_memory'] / 2**30:.1f} GiB" if cost["build_seconds"] > 0 else "-"
            asked = f"{making:>9} {cost['memory'] / 2**30:6.1f} GiB {format_seconds(cost['seconds']):>12}"
            counts = f"{cost['prompt_tokens']:11.0f} {cost['answer_tokens']:8.0f}"
            lines.append(f"{arm:<29} {built:<13} {disk:>9} {asked}  {counts}")
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])


def summary(results: Results, against: str = RAG) -> Summary:
    """Return the numbers of a comparison, every arm paired with `against`."""
    every = [(arm, kind) for arm in results.arms for kind in KINDS]
    shares = {(arm, kind, measure): results.share(arm, kind, measure) for arm, kind in every for measure in MEASURES}
    means = {key: list(results.outcomes(*key, "f1").values()) for key in every}
    others = [arm for arm in results.arms if arm != against and against in results.arms]
    pairs = [paired(results, arm, against, kind) for kind in KINDS for arm in others if shares[arm, kind, "refused"].n]
    few = {kind: max(shares[arm, kind, "refused"].n for arm in results.arms) for kind in KINDS}
    few = ", ".join(f"{n} {kind}" for kind, n in few.items() if 0 < n < FEW)
    notes = [f"Few questions ({few}): the intervals are wide, and a difference may be chance."] if few else []
    cut = sum(row["left_out"] > 0 for row in results.rows)
    notes += [f"In {cut} answers something to read was left out, as it didn't fit the context."] if cut else []
    return Summary(
        shares,
        {key: mean_difference(values, [0.0] * len(values)) for key, values in means.items()},
        {arm: _refusals(results, arm) for arm in results.arms},
        pairs,
        {arm: _costs(results, arm) for arm in results.arms},
        {arm: results.cut(arm) for arm in results.arms},
        notes,
    )


def _refusals(results: Results, arm: str) -> tuple[Share, Share]:
    """Return precision and recall of an arm's refusals; the seeds together count as one."""
    rows = [row for row in results.rows if row["arm"] == arm and row["scores"]["refused"]]
    seeds = len({row["seed"] for row in results.rows if row["arm"] == arm})
    due = sum(row["kind"] == "unanswerable" for row in rows)
    return Share(due / seeds, len(rows) / seeds), results.share(arm, "unanswerable", "refused")


def _costs(results: Results, arm: str) -> dict[str, float]:
    rows = [row for row in results.rows if row["arm"] == arm]
    builds = [head["build"] for (name, _), head in results.heads.items() if name == arm]
    costs = {name: statistics.mean(row[name] for row in rows) for name in ("prompt_tokens", "answer_tokens")}
    costs |= {
        "seconds": statistics.median(row["seconds"] for row in rows),
        "memory": max(row["memory"] for row in rows),
    }
    for name in ("seconds", "disk", "memory", *(f"{part}_seconds" for part in BUILT)):
        made = [build.get(name, math.nan) for build in builds] if all(builds) else [math.nan]
        costs[f"build_{name}"] = statistics.mean(made)
    return costs
