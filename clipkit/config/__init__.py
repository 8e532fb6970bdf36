"""Every setting of clipkit: names, types, units and checks. The values stand in conf/."""

from clipkit.config.pretrain import PretrainConfig
from clipkit.config.schema import SettingsError, identity, parse

__all__ = ["PretrainConfig", "SettingsError", "identity", "parse"]
