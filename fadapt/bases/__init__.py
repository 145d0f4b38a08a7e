"""Bases: frozen linear maps, one file a format. See ``protocol.py`` for what each must do."""

from fadapt.bases.dense import Dense
from fadapt.bases.protocol import Base, base_of, is_supported, register_base

__all__ = ["Base", "Dense", "base_of", "is_supported", "register_base"]
