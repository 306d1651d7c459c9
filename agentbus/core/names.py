"""Names: their one form, those that no session can have, and names made from folders and logins.

Knows nothing about SQL, sockets or MCP. Implements [NAME-1] to [NAME-4], [NAME-10], [NAME-11].
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache

from agentbus.core.errors import InvalidRequest
from agentbus.core.text import one_line

__all__ = [
    "BUS_NAME",
    "EVERYBODY_THERE",
    "LINK_NAME",
    "MAX_NAME_CHARS",
    "NAME_RULE",
    "address",
    "fit_name",
    "folded",
    "folder_wish",
    "group_name",
    "is_group",
    "is_kept",
    "login_name",
    "machine_name",
    "machine_of",
    "normalise_name",
    "numbered_name",
    "session_name",
    "session_wish",
    "shown_address",
    "similar",
    "split_address",
]

# How much of two names is the same, as difflib counts it, if one can be a slip for the other.
_SIMILAR = 0.6
# Long enough for a project's folder, short enough for a table and for a model to copy without a mistake.
MAX_NAME_CHARS = 32
NAME_RULE = f"use 1 to {MAX_NAME_CHARS} letters and digits, with _ - . between them, for example backend"

# The sender of what the bus itself has to say to a session. [PRES-5]
BUS_NAME = "agentbus"
# The link is a peer under this name: no name has its form, so nobody else can have it, or send to it. [LINK-1]
LINK_NAME = "*link"
# The name in `NAME@MACHINE` that stands for all who are present there. [ADDR-6]
EVERYBODY_THERE = "*"
# What a model would take for its user, its client or the bus. The login name belongs here too: a person sends under it.
_KEPT = frozenset(("user", "human", "system", "assistant", BUS_NAME, "claude"))
# A model that writes these wants all peers, and not one of that name.
_EVERYBODY = frozenset(("all", "everyone", "everybody"))
# When neither AGENTBUS_NAME nor the folder gives a name (a session in `/`, for example). The second is for a machine
# whose user is called like the first.
_DEFAULT_NAMES = ("agent", "session")

# An error quotes this much of a bad value; an unbounded quote would bury the sentence around it.
_MAX_QUOTED_CHARS = 48
# A text of more characters than this is refused unread. Decomposed, a letter has up to 4.
_MAX_RAW_CHARS = 4 * MAX_NAME_CHARS

# The name of a machine stands in the configuration of a server, in subjects and in file names.
_MACHINE = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-")
_ASCII = "abcdefghijklmnopqrstuvwxyz0123456789_.-"
_OTHER_ASCII = {code: "-" for code in range(128) if chr(code) not in _ASCII}
# What follows a name in a list or a remark: `back, ci`, `back (online)`, `back: hello`.
_AFTER = r"[,;:|()\[\]{}<>\t\r\n]"
_MESSAGE_ID = r"#\s?\d+"
# Letters and marks, by their Unicode names, that nobody sees or that look like punctuation.
_NO_LETTERS = ("FILLER", "VARIATION SELECTOR", "GRAPHEME JOINER", "VOWEL INHERENT", "TATWEEL")
_NO_LETTER = "MODIFIER LETTER"
# Unicode has another spelling for these too, but keyboards type them as they are: SARA AM, single jamo.
_TYPED = ("THAI ", "LAO ", "HANGUL LETTER ")
# Alphabets whose letters look like those of one another. Each letter's Unicode name begins with its alphabet.
_ALIKE = ("LATIN", "GREEK", "COPTIC", "CYRILLIC", "ARMENIAN", "CHEROKEE", "LISU")


# Names that are in their one form. A session sends to a few, and each message asks for its name several times.
_known: set[str] = set()
_MOST_KNOWN = 1_000


def normalise_name(raw: object) -> str:
    """The one form of a name: NFC, without case, a space as `-`. Idempotent. [NAME-1]

    Raises InvalidRequest for what is no name, with the name that was probably meant. [NAME-2]
    """
    if not isinstance(raw, str):
        raise InvalidRequest(f"a name is text, not {type(raw).__name__}")
    if raw in _known:
        return raw
    text = raw.strip()
    # The length is checked first: a name of a million characters then costs nothing but its refusal.
    if len(text) > _MAX_RAW_CHARS:
        raise _too_long(raw, len(text))
    name = folded(text)
    if not name or name != _spelled(name):
        raise _no_name(raw)
    if len(name) > MAX_NAME_CHARS:
        raise _too_long(raw, len(name))
    _check_alphabets(raw, name)
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known.add(name)
    return name


def address(raw: object) -> str:
    """The name that a message goes to, or that a sender is reached under. Raises InvalidRequest. [NAME-2]"""
    name = normalise_name(raw)
    if name in _EVERYBODY:
        raise _everybody(raw)
    return name


def machine_name(raw: object, what: str = "machine") -> str:
    """The one form of the name of a machine (or of `what` else). Raises InvalidRequest. [ADDR-1]"""
    name = raw.strip().lower() if isinstance(raw, str) else ""
    if not name or len(name) > MAX_NAME_CHARS or not _MACHINE.issuperset(name) or {name[0], name[-1]} & {"-", "_"}:
        raise InvalidRequest(
            f"{_quoted(str(raw))} is not the name of a {what}",
            hint=f"use 1 to {MAX_NAME_CHARS} of a-z and 0-9, with - and _ between them",
        )
    return name


def split_address(raw: str) -> tuple[str, str]:
    """The name and the machine in `NAME@MACHINE`, each in its one form. Raises InvalidRequest. [ADDR-1]"""
    name, _, machine = raw.rpartition("@")
    return address(name), machine_name(machine)


def machine_of(shown: str) -> str:
    """The machine in an address in its one form; "" if it names none. What begins with @ is no address."""
    name, _, machine = shown.partition("@")
    return machine if name else ""


def shown_address(raw: str) -> str:
    """The one form of a name, with or without a machine, whose mail is looked at. Raises InvalidRequest."""
    name, at, machine = raw.rpartition("@")
    if not at:
        return normalise_name(raw)
    is_all = name.strip() == EVERYBODY_THERE
    return f"{EVERYBODY_THERE if is_all else normalise_name(name)}@{machine_name(machine)}"


def session_name(raw: object) -> str:
    """A name that a session asks for. Raises InvalidRequest, also for one that no session can have. [NAME-11]"""
    name = address(raw)
    if is_kept(name):
        raise InvalidRequest(
            f'no session can have the name "{name}": it would be taken for the user, the client or the bus',
            hint="choose another",
        )
    return name


def is_group(raw: object) -> bool:
    """Whether `raw` is written as a group: with `@` before it. Inside of a name, `@` says something else. [GROUP-1]"""
    return isinstance(raw, str) and raw.lstrip().startswith("@")


def group_name(raw: object) -> str:
    """The one form of a group's name, with its `@`, which `raw` can leave out where only a group can be meant.

    Raises InvalidRequest for what is none. [GROUP-1]
    """
    return "@" + address(raw.strip().removeprefix("@") if isinstance(raw, str) else raw)


def is_kept(name: str) -> bool:
    """Whether no session can have `name`, because a model would take it for an authority. [NAME-11]"""
    return name in _KEPT or name == login_name()


@cache
def login_name() -> str:
    """The name under which the person at this machine sends; "shell" for a user id without a name. [CLI-2]"""
    import pwd  # only a shell and a session that starts need it

    try:
        return fit_name(pwd.getpwuid(os.getuid()).pw_name) or "shell"
    except KeyError:  # a user id without an entry, as in some containers
        return "shell"


def fit_name(raw: str) -> str | None:
    """A name made from a folder, a title or a login, cut to length; None when nothing is left. [NAME-3]

    Of letters from alphabets that look alike, those of the alphabet with the most stay.
    """
    text = _plain(raw.strip()[:_MAX_RAW_CHARS])
    # In ASCII as ever, so that no session changes its name: a dot is a dash here.
    name = _spelled(_of_one_alphabet(folded(text).replace(".", "-")))
    return name[:MAX_NAME_CHARS].rstrip("-") or _symbol_name(text)


def session_wish(raw: str) -> str | None:
    """What `fit_name` makes of `raw`, if a session can have that name. [NAME-3]"""
    name = fit_name(raw)
    return None if name is None or name in _EVERYBODY or is_kept(name) else name


def folder_wish(folder: str) -> str:
    """The name of a session that is called after `folder`. [NAME-3]"""
    wish = session_wish(os.path.basename(os.path.normpath(folder)))
    return wish or next(name for name in _DEFAULT_NAMES if not is_kept(name))


def numbered_name(name: str, number: int) -> str:
    """`name-2`, `name-3`, ...: cut so that it stays a name. [NAME-4]"""
    suffix = f"-{number}"
    return name[: MAX_NAME_CHARS - len(suffix)].rstrip("-.") + suffix


def similar(asked: str, names: Iterable[str]) -> tuple[str, ...]:
    """Those of `names`, three at most, that somebody who asked for `asked` can have meant; the nearest first."""
    near = [name for name in names if _have_letters_in_common(asked, name)]
    if not near:
        return ()
    from difflib import get_close_matches  # takes 8 ms: only a sender that mistypes a name waits for it

    return tuple(get_close_matches(asked, near, n=3, cutoff=_SIMILAR))


def _have_letters_in_common(one: str, other: str) -> bool:
    """Whether difflib may call two names similar. It counts what is in the same order, this counts every letter."""
    left = list(other)
    for letter in one:
        if letter in left:
            left.remove(letter)
    return 2 * (len(other) - len(left)) >= _SIMILAR * (len(one) + len(other))


def folded(text: str) -> str:
    """`text` in NFC and without case, with `-` for each space; of the form of a name if it can be one."""
    if text.isascii():
        return text.lower().replace(" ", "-")
    from unicodedata import normalize  # a name in ASCII, as most are, does not pay for the import

    # Case is folded in the decomposed text, as Unicode's rule for caseless matching has it (3.13, D145). A dot on an i
    # cannot be seen: it is what folding leaves of a capital I with a dot.
    return normalize("NFC", normalize("NFD", text).casefold().replace("i\u0307", "i")).replace(" ", "-")


def _spelled(text: str) -> str:
    """`text` with `-` for each character that no name has, and without what cannot be at its ends."""
    if text.isascii():
        return text.translate(_OTHER_ASCII).strip("-.")
    from unicodedata import category

    shown: list[str] = []
    for character in text:
        is_part = character in "_-." or _is_letter(character)
        # A mark needs a letter before it.
        if category(character)[0] == "M" and (not shown or shown[-1] in "_-."):
            is_part = False
        shown.append(character if is_part else "-")
    return "".join(shown).strip("-.")


def _is_letter(character: str) -> bool:
    """Whether names have this letter, mark or digit; a variant of another character, as a fullwidth one, is none."""
    from unicodedata import category, name, normalize

    kind = category(character)
    if kind[0] != "L" and kind not in ("Mn", "Mc", "Nd", "Nl"):
        return False
    called = name(character, "")
    if called.startswith(_NO_LETTER) or any(part in called for part in _NO_LETTERS):
        return False
    return normalize("NFKC", character) == character or called.startswith(_TYPED)


def _plain(text: str) -> str:
    """`text` with the character that is meant for each variant of it, and without what only steers how it is shown."""
    if text.isascii():
        return text
    from unicodedata import category, normalize

    composed = (one for one in normalize("NFC", text) if category(one) != "Cf")
    return "".join(one if _is_letter(one) else normalize("NFKC", one) for one in composed)


def _alphabets(name: str) -> dict[str, str]:
    """The letters of `name` of each alphabet that looks like another."""
    from unicodedata import name as called

    found: dict[str, str] = {}
    for character in name:
        alphabet = called(character, "").split(" ", 1)[0]
        if alphabet in _ALIKE:
            found[alphabet] = found.get(alphabet, "") + character
    return found


def _of_one_alphabet(text: str) -> str:
    if text.isascii():
        return text
    found = sorted(_alphabets(text).values(), key=len, reverse=True)
    return text.translate(dict.fromkeys(map(ord, "".join(found[1:])), "-"))


def _check_alphabets(raw: str, name: str) -> None:
    """Refuse a mix of alphabets that look alike. [NAME-10]"""
    if name.isascii():
        return
    found = sorted(_alphabets(name).items(), key=lambda one: len(one[1]), reverse=True)
    if len(found) > 1:
        (most, _), (other, letters) = found[:2]
        raise InvalidRequest(
            f'{_quoted(raw)} mixes two alphabets that look alike ("{letters}" is {other.capitalize()})',
            hint=f"write it in {most.capitalize()} alone",
        )


def _symbol_name(text: str) -> str | None:
    """A name for a folder that is called by symbols alone: what Unicode calls them, as `party-popper`."""
    from unicodedata import category, name

    words = " ".join(name(one, "") for one in text if category(one) == "So")
    return _spelled(folded(words))[:MAX_NAME_CHARS].rstrip("-") or None


def _meant(raw: str) -> str | None:
    """The name that was probably meant by something that is none."""
    import re  # takes 2 ms, and a send to a name does not need it

    last = raw[:_MAX_RAW_CHARS].replace("\\", "/").rstrip("/ ").rpartition("/")[2]
    return next((name for name in map(_near, re.split(_AFTER, last)) if name), None)


def _near(word: str) -> str | None:
    """`word` as a name, with its dots; None if nothing is left, or if that is none either."""
    name = _spelled(folded(_plain(word.strip())))
    return name if name and len(name) <= MAX_NAME_CHARS and len(_alphabets(name)) < 2 else None


def _no_name(raw: str) -> InvalidRequest:
    import re

    meant = _meant(raw)
    if meant in _EVERYBODY:
        return _everybody(raw)
    hint = NAME_RULE if meant is None else f'did you mean "{meant}"?'
    if re.fullmatch(_MESSAGE_ID, raw.strip()):
        hint += " To answer a message, send to the name in its from, with reply_to"
    elif meant is not None and is_group(raw):
        hint += " This takes one peer, and no group"
    elif meant is not None and re.search("[,;]", raw):
        hint += " A message goes to one name"
    return InvalidRequest(f"{_quoted(raw)} is not a name", hint=hint)


def _everybody(raw: object) -> InvalidRequest:
    return InvalidRequest(f"{_quoted(str(raw))} is not a name", hint="broadcast sends to all who are online")


def _too_long(raw: str, length: int) -> InvalidRequest:
    return InvalidRequest(
        f"the name {_quoted(raw)} is {length:,} characters, the limit is {MAX_NAME_CHARS}",
        hint="use a shorter one",
    )


def _quoted(raw: str) -> str:
    return f'"{one_line(raw, _MAX_QUOTED_CHARS)}"'
