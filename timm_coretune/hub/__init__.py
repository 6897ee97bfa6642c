from ..export import export_model as export_model
from .connection import HubError as HubError
from .push import push_command as push_command
from .push import push_run as push_run
from .push import push_to_hub as push_to_hub
