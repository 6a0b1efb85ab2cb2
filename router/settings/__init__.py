"""Settings: one TOML file, overridden by MTP_ROUTER_* environment variables. Unknown keys are refused.

`MTP_ROUTER_SERVER__LISTEN=127.0.0.1:0` sets `[server] listen`; two underscores go one table down. The tables stand in
`service.py`, `backends.py` and `models.py`.
"""

from router.settings.backends import LlamaCppSettings, LlamaServerSettings, MlxSettings, OllamaSettings
from router.settings.load import Settings, effective_settings, load_settings
from router.settings.models import ModelSettings, SamplingSettings
from router.settings.places import CONFIG_VARIABLE, ENV_PREFIX, HOME_VARIABLE, data_home, default_config_path
from router.settings.problems import describe_problem
from router.settings.service import DiscoverySettings, ResilienceSettings, SchedulerSettings, ServerSettings
from router.settings.table import MODEL_NAME

__all__ = [
    "CONFIG_VARIABLE",
    "ENV_PREFIX",
    "HOME_VARIABLE",
    "MODEL_NAME",
    "DiscoverySettings",
    "LlamaCppSettings",
    "LlamaServerSettings",
    "MlxSettings",
    "ModelSettings",
    "OllamaSettings",
    "ResilienceSettings",
    "SamplingSettings",
    "SchedulerSettings",
    "ServerSettings",
    "Settings",
    "data_home",
    "default_config_path",
    "describe_problem",
    "effective_settings",
    "load_settings",
]
