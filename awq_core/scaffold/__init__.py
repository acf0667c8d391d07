"""A new plugin as a complete distribution, its `Architecture` filled in by inference.

templates/*.txt  --string.Template-->  pyproject.toml, README.md, the module, its test, a CI file
"""

from awq_core.scaffold.tiny import config_for_tests, smallest_config
from awq_core.scaffold.write import Scaffold, write_plugin

__all__ = ["Scaffold", "config_for_tests", "smallest_config", "write_plugin"]
