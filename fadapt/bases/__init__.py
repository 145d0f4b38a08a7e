"""Bases: frozen linear maps, one file a format. See ``protocol.py`` for what each must do."""

from fadapt.bases.conv import Conv
from fadapt.bases.dense import Dense
from fadapt.bases.embedding import Embedding
from fadapt.bases.protocol import Base, base_of, is_linear, is_supported, register_base

__all__ = [
    "Base",
    "Conv",
    "Dense",
    "Embedding",
    "base_of",
    "is_linear",
    "is_supported",
    "register_base",
]
