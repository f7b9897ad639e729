"""The HTTP side: schemas, routes, text, streams, errors. It knows no torch."""

from server.api.app import create_app
from server.api.caller import Caller
from server.api.last_used import LastUsed
from server.api.metrics import Metrics
from server.api.publish import publish_folder
from server.api.services import Services
from server.api.task_settings import put_settings

__all__ = ["Caller", "LastUsed", "Metrics", "Services", "create_app", "publish_folder", "put_settings"]
