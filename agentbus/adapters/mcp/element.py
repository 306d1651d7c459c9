"""The element that the model gets for a message. It is the same for channel, inbox and check_messages.

Pure. Implements [CHAN-2], [INBOX-7], [TRUST-2].
"""

from __future__ import annotations

import re

from agentbus.core.model import Envelope, timestamp

__all__ = ["attributes", "defused", "element"]

# An opening or closing channel tag, with any spaces and in upper or lower case.
_TAG = re.compile(r"<(?=\s*/?\s*channel)", re.IGNORECASE)


def defused(text: str) -> str:
    """`text` with each `<channel` and `</channel` made harmless, everything else unchanged. [TRUST-2]"""
    return _TAG.sub("&lt;", text) if "<" in text else text


def attributes(envelope: Envelope) -> dict[str, str]:
    """What the element says about a message besides its text. No value needs escaping. [CHAN-2]"""
    # Names consist of a-z 0-9 _ -; the other values are numbers and a timestamp.
    found = {"from": envelope.sender, "msg_id": str(envelope.id), "ts": timestamp(envelope.sent_at)}
    if envelope.reply_to is not None:
        found["reply_to"] = str(envelope.reply_to)
    return found


def element(envelope: Envelope) -> str:
    """`envelope` as the element that a client makes from its event. [READ-1]"""
    words = "".join(f' {key}="{value}"' for key, value in attributes(envelope).items())
    return f'<channel source="agentbus"{words}>{defused(envelope.text)}</channel>'
