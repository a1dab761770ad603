"""Import PyTorch's test utilities without the settings that their import changes for the whole process."""

from __future__ import annotations

from unittest import mock

from hypothesis import settings

settings.register_profile("before PyTorch", settings.default)
with mock.patch("torch.backends.disable_global_flags"):
    import torch.testing._internal.common_utils  # noqa: F401  # loads a profile of its own
settings.load_profile("before PyTorch")
