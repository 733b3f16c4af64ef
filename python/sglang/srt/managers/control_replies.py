"""What several schedulers answered to one question, as one answer."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sglang.srt.managers.io_struct import ControlReply


def merged_reply(answers: Sequence[ControlReply]) -> ControlReply:
    """One reply for those of all replicas; see `TokenizerManager.control`."""
    told = next((answer for answer in answers if not answer.success), answers[0])
    if len(answers) == 1:
        return told
    data = {**told.data, "replicas": [answer.data for answer in answers]}
    return msgspec.structs.replace(told, data=data)
