"""The installed version; a checkout that is not installed has none."""

from importlib import metadata

try:
    __version__ = metadata.version("sepconv")
except metadata.PackageNotFoundError:
    __version__ = "0+checkout"
