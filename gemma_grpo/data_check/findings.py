"""What a check can find: its words, how serious it is, and the numbers. Owns the list; each finding is counted in a file of its own kind.

Every text of a row that leaves this folder has gone through `excerpt`: personal data and secrets out, on one line, harmless to show.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import Any, Literal

from gemma_grpo.data_check.personal import excerpt
from gemma_grpo.data_check.rows import CheckedRow
from gemma_grpo.shares import wilson_interval

Level = Literal["serious", "look", "fine"]
EXAMPLES = 3
MOST_NAMES = 12


@dataclass(frozen=True, slots=True)
class Words:
    """What a finding is called, what it means and what to do."""

    title: str
    meaning: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row to look at."""

    row: int
    text: str
    """An excerpt, redacted and escaped."""


@dataclass(frozen=True, slots=True)
class Finding:
    """So many of so many, and where the first stand."""

    name: str
    """A key of WORDS."""
    level: Level
    count: int
    of: int
    what: str
    """What is counted: rows, replies, held-out rows."""
    examples: tuple[Example, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further figures, by kind or source: a count, or a share with its interval and n."""

    @property
    def share(self) -> float:
        """Of 1; 0 of nothing."""
        return self.count / self.of if self.of else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The finding with its words, as JSON."""
        words = WORDS[self.name]
        return {
            **{"name": self.name, "title": words.title, "level": self.level},
            **{"count": self.count, "of": self.of, "what": self.what, "share": self.share},
            **{"meaning": words.meaning, "remedy": words.remedy, "details": dict(self.details)},
            "examples": [{"row": one.row, "text": one.text} for one in self.examples],
        }


def level_of(count: int, of: int, serious_from: float) -> Level:
    """fine for none, serious from a share on, look between."""
    if not count:
        return "fine"
    return "serious" if count >= serious_from * of else "look"


def examples_of(found: Iterable[tuple[CheckedRow, str]], around: re.Pattern[str] | None = None) -> tuple[Example, ...]:
    """The first few rows with the text to be seen of each, from its beginning or around what a pattern fits."""
    return tuple(Example(row.number, excerpt(text, around)) for row, text in islice(found, EXAMPLES))


def share_with_interval(part: float, whole: int) -> dict[str, Any]:
    """A share, its 95 % interval (Wilson) and n; the value is None of nothing."""
    return {"value": part / whole if whole else None, "interval": list(wilson_interval(part, whole)), "n": whole}


def counted(found: Iterable[str]) -> dict[str, int]:
    """Name -> how often, the commonest first; equals by name. Names are a dataset's own: masked, and those after the twelfth in one."""
    counts: Counter[str] = Counter()
    for name, count in Counter(found).items():
        counts[excerpt(name)] += count
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ranked[MOST_NAMES:])
    return dict(ranked[:MOST_NAMES]) | ({f"{len(ranked) - MOST_NAMES} others": rest} if rest else {})


WORDS: Mapping[str, Words] = MappingProxyType(
    {
        "dropped": Words(
            "rows that cannot be used",
            "They are no pair or prompt and are left out of training, each counted under one reason.",
            "`gemma-grpo data stats` names the first three of each reason. Mend them, or the columns' names.",
        ),
        "exact_duplicates": Words(
            "rows that are the same as an earlier one",
            "They count twice in the reward's training, and make it look surer than the data are.",
            "Keep one of each.",
        ),
        "normalised_duplicates": Words(
            "rows that differ from an earlier one in case, spacing or punctuation alone",
            "The same as exact duplicates; they come of joining several copies of one dataset.",
            "Keep one of each.",
        ),
        "near_duplicates": Words(
            "rows nearly the same as an earlier one",
            "At least 80 % of their three-word pieces are shared: templates, or edits of one text.",
            "Look at the examples. Of templates keep a few; of edits keep one.",
        ),
        "repeated_prompts": Words(
            "rows whose prompt an earlier row has too",
            "For the reward they are further pairs; the policy is trained on each prompt once.",
            "Nothing, if several pairs to a prompt are meant.",
        ),
        "split_leaks": Words(
            "held-out rows whose prompt is nearly one of training",
            "The split keeps one conversation on one side by its first turn; these differ a little there. What is measured on them is "
            "partly remembered.",
            "Take the twins out, or give the rows the same first turn.",
        ),
        "opposite_labels": Words(
            "rows with the same prompt and replies as another, and the opposite label",
            "People disagree, or a label was turned round: the two rows cancel out, and no reward can be right on both.",
            "Keep the one that most raters gave, or neither.",
        ),
        "identical_replies": Words(
            "rows whose chosen and rejected are the same text",
            "They teach the reward nothing, and count as ties wherever accuracy is measured.",
            "Take them out.",
        ),
        "chosen_and_rejected": Words(
            "rows whose rejected reply is chosen in another row",
            "To the same prompt that is a ranking of three; elsewhere it is a stock reply, and a reward can learn the phrase's record "
            "instead of its use.",
            "Look at the examples; thin out stock replies that stand in many rows.",
        ),
        "continued_replies": Words(
            "rows whose prompt goes on with another row's reply",
            "Which of the two replies a conversation went on with tells the other row's label. It does no harm while both are on one side "
            "of the split, which is by conversation here; a split by row leaks.",
            "Never split such data by row. Measure on rows without a sibling too.",
        ),
        "length_bias": Words(
            "pairs in which the longer reply is chosen",
            "What a judge that looks at length alone would score, ties half; 50 % is no bias. A reward learns the bias with the rest.",
            "Compare the reward adapter's accuracy with this figure, and on pairs of like length (docs/method.md). Sources with opposite "
            "bias: reward_model.per_source.",
        ),
        "languages": Words(
            "rows in another language than most",
            "By script and common words; a guess, and unknown where it cannot tell. Few rows of a language teach it little.",
            "Nothing, if they are meant.",
        ),
        "language_mismatch": Words(
            "rows in which the chosen reply is in another language than the last question",
            "The reward learns to like answers in the wrong language.",
            "Look at the examples: translations are asked for, mistakes are not.",
        ),
        "gemma_tokens": Words(
            "rows that spell Gemma's control tokens",
            "Here they stay plain text and cannot end a turn; other tools read them as turns. Usually a template was applied already.",
            "Give the bare text, without <start_of_turn>, <end_of_turn>, <bos>.",
        ),
        "other_templates": Words(
            "rows that spell another template's markers",
            "The text was rendered for another model; a policy learns to write the markers.",
            "Take the text from before it was rendered, as messages.",
        ),
        "role_labels": Words(
            "rows with a role label inside a reply",
            "A reply that goes on as the other side (Human:, Assistant:, User:) was cut wrongly, or the model talked to itself.",
            "Look at the examples. The rule role_leak takes reward from such replies.",
        ),
        "hidden_characters": Words(
            "rows with invisible, reordering or control characters",
            "Zero-width and bidirectional characters and terminal codes change what people see and what the tokenizer reads.",
            "Take them out, unless a script needs them.",
        ),
        "secrets": Words(
            "rows that look as if they held a key, a card or a bank account",
            "Keys by their form, card numbers by their checksum (Luhn), IBANs by theirs (mod 97). A model can repeat what it has learned.",
            "Take them out before training, and before the data go anywhere. Revoke keys that were real.",
        ),
        "contact_data": Words(
            "rows that look as if they held an e-mail address, a phone number or an IP address",
            "By their form alone: made-up ones are counted too, and names and addresses are not found at all.",
            "Replace them, if they are people's.",
        ),
        "empty_replies": Words(
            "rows with a reply without a letter or digit",
            "Dots, dashes or emoji alone are no reply; as the chosen one they reward saying nothing.",
            "Take them out. Replies of no characters at all are dropped while reading.",
        ),
        "long_replies": Words(
            "rows with a reply of more than 1,000 words",
            "They are cut by max_completion_length in rollouts, and dropped from the reward's training by reward_model.max_length.",
            "Raise the limits, or leave such rows out.",
        ),
        "truncation": Words(
            "rows that do not fit the recipe's lengths",
            "Prompts over max_prompt_length lose their oldest turns, or are dropped; pairs over reward_model.max_length are dropped; "
            "chosen replies over max_completion_length are longer than any rollout can be.",
            "Raise the limit that most rows break, if memory allows (`gemma-grpo plan`).",
        ),
        "refusals": Words(
            "rows whose chosen reply declines",
            "By phrases, in English. Where refusals are chosen often, a policy learns to decline; where they are rejected, to comply.",
            "Compare both shares, and watch the refusal figures of the evaluation.",
        ),
    }
)
