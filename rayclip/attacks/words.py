"""Rules for splitting texts into words and for stop words in BERT-Attack: the correct ones, and those of MMCoA's
code."""

import re
from collections.abc import Callable
from dataclasses import dataclass

_WORDS = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\s\w]+|_+")

# English function words: replacing them, or inserting them, changes grammar rather than meaning.
STOP_WORDS = frozenset(
    """
    a about above across after again against all almost along already also although am among an and another any anyone
    anything are around as at away back be became because been before behind being below beside between beyond both but
    by can cannot could did do does doing down during each either else enough even ever every everyone everything for
    from had has have having he hence her here hers herself him himself his how however i if in indeed instead into is
    it its itself just least less may me meanwhile might mine more moreover most mostly much must my myself neither
    never nevertheless no nobody none nor not nothing now nowhere of off often on once only onto or other others
    otherwise our ours ourselves out over own per perhaps quite rather really same shall she should since so some
    somehow someone something sometimes somewhere still such than that the their theirs them themselves then there
    therefore these they this those though through throughout thus to together too toward towards under unless until
    up upon us very via was we well were what whatever when whenever where wherever whether which while who whoever
    whole whom whose why will with within without would yet you your yours yourself yourselves
    """.split()
)

# Where the list in Co-Attack's, SGA's and MMCoA's code differs from ours
_LACKS = frozenset(
    """
    away be became because did do does doing each every had has have having instead less might much often own perhaps
    quite rather really shall should since so someone sometimes still though together us very via well will
    """.split()
)
_ALSO_HAS = frozenset(
    """
    ! " % & ( ) * + , - . / : ; < = > ? @ ^ | · ～ afterwards ain alone amongst anyhow anyway anywhere aren aren't b
    beforehand besides couldn couldn't d didn didn't doesn doesn't don don't due elsewhere empty everywhere except first
    former formerly hadn hadn't hasn hasn't haven haven't hereafter hereby herein hereupon hundred isn isn't it's latter
    latterly ll mightn mightn't mustn mustn't namely needn needn't next noone o one please s shan shan't she's should've
    shouldn shouldn't sometime t that'll thence thereafter thereby therein thereupon thru used ve wasn wasn't weren
    weren't whence whereafter whereas whereby wherein whereupon whither won won't wouldn wouldn't y you'd you'll you're
    you've
    """.split()
) | {"a the"}


@dataclass(frozen=True)
class WordRules:
    """Rules for how a text is split into words, and which of them may change.

    Attributes:
        split: returns the words of a text; joined by blanks they represent it.
        stop_words: neither replaced nor inserted.
        letters_only: whether a replaced word must contain a letter or a digit.
        may_stay: whether a word competes with its substitutes: if it wins, it stays, and the next word is tried.
    """

    split: Callable[[str], list[str]]
    stop_words: frozenset[str]
    letters_only: bool
    may_stay: bool

    def may_change(self, word: str) -> bool:
        return word not in self.stop_words and not (self.letters_only and not any(map(str.isalnum, word)))


def split_words(text: str) -> list[str]:
    """Split into lower-case words with punctuation as words of their own, as CLIP's tokenizer does."""
    return _WORDS.findall(text.lower())


def split_at_blanks(text: str) -> list[str]:
    """Split as MMCoA's code does: keeps case and punctuation, and an empty word between two blanks."""
    return text.split(" ")


CORRECT = WordRules(split=split_words, stop_words=STOP_WORDS, letters_only=True, may_stay=False)
# The list is in lower case and compared case-sensitively: "This" at the start of a prompt is no stop word.
REFERENCE = WordRules(
    split=split_at_blanks, stop_words=(STOP_WORDS - _LACKS) | _ALSO_HAS, letters_only=False, may_stay=True
)
