"""Where settings and data lie, and the variables that say so."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

ENV_PREFIX = "MTP_ROUTER_"
HOME_VARIABLE = "MTP_ROUTER_HOME"
CONFIG_VARIABLE = "MTP_ROUTER_CONFIG"


def data_home() -> Path:
    """Folder of pulled models: $MTP_ROUTER_HOME, else the platform's place for application data."""
    configured = os.environ.get(HOME_VARIABLE)
    return Path(configured) if configured else Path(platformdirs.user_data_dir("mtp-router", appauthor=False))


def default_config_path() -> Path:
    """Settings file where none is named: $MTP_ROUTER_CONFIG, else mtp-router.toml in the platform's config folder."""
    configured = os.environ.get(CONFIG_VARIABLE)
    if configured:
        return Path(configured)
    return Path(platformdirs.user_config_dir("mtp-router", appauthor=False)) / "mtp-router.toml"
