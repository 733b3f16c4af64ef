"""SGLang's flags that do nothing here, and why: accepted with a warning, or refused."""

from __future__ import annotations

from sglang.srt.configs.flag_spec import FlagSpec

OTHER_FLAGS: tuple[FlagSpec, ...] = ()
