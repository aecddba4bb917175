"""What a chat request may make the server load: pictures that decode, of a bounded size, from public addresses.

vLLM 0.9.1 fetches any http(s) URL a client names, private networks included, decodes pictures of any size, and answers
500 when a fetch fails or a file is damaged. For this kit's models each of these is a clear 400. A local file is
refused by vLLM itself unless `--allowed-local-media-path` allows its folder.

Environment variables: QWEN_MERGE_ALLOW_PRIVATE_MEDIA=1 fetches from private networks too; QWEN_MERGE_MAX_IMAGE_PIXELS
(default 64,000,000) bounds width times height.
"""

import os
from functools import wraps
from io import BytesIO
from ipaddress import ip_address
from pathlib import Path

from qwen_merge.overlays.vllm import MODEL_TYPE

DEFAULT_MAX_PIXELS = 64_000_000


def hook() -> None:
    """Give requests to this kit's models a connector with limits; safe to call again, other models keep vLLM's."""
    from vllm.entrypoints.chat_utils import AsyncMultiModalContentParser

    original = AsyncMultiModalContentParser.__init__
    if getattr(original, "limits_media", False):
        return
    connector_class = None

    @wraps(original)
    def init(self, tracker):
        nonlocal connector_class
        original(self, tracker)
        if tracker.model_config.hf_config.model_type == MODEL_TYPE:
            connector_class = connector_class or _limited_connector_class()
            self._connector = connector_class(allowed_local_media_path=tracker.allowed_local_media_path)

    init.__dict__["limits_media"] = True
    AsyncMultiModalContentParser.__init__ = init


def check_size(size: tuple[int, int]) -> None:
    """Refuse a picture by its (width, height), before a pixel of it is decoded.

    Raises:
        ValueError: more pixels than allowed.
    """
    limit = int(os.environ.get("QWEN_MERGE_MAX_IMAGE_PIXELS", DEFAULT_MAX_PIXELS))
    if size[0] * size[1] > limit:
        raise ValueError(
            f"a picture has {size[0]} x {size[1]} = {size[0] * size[1]:,} pixels; at most {limit:,} are allowed. "
            "Send it smaller; the model scales it down in any case."
        )


def check_address(host: str, address: str) -> None:
    """Refuse an address that is not public.

    Raises:
        ValueError: loopback, private, link-local and the like.
    """
    if not ip_address(address.partition("%")[0]).is_global and os.environ.get("QWEN_MERGE_ALLOW_PRIVATE_MEDIA") != "1":
        raise ValueError(
            f"the media URL's host {host} has the address {address}, which is not public; send the file itself as a "
            "data URL, or start the server with QWEN_MERGE_ALLOW_PRIVATE_MEDIA=1."
        )


def _limited_connector_class():
    """Made on first use: the modules it needs are only in processes that serve."""
    import aiohttp
    from PIL import Image
    from vllm.connections import HTTPConnection
    from vllm.multimodal.image import ImageMediaIO
    from vllm.multimodal.utils import MediaConnector

    class PublicConnector(aiohttp.TCPConnector):
        """Looks at every address it is about to connect to: after redirects too, and what the name means now."""

        async def _resolve_host(self, host, port, traces=None):
            resolved = await super()._resolve_host(host, port, traces)
            for entry in resolved:
                check_address(host, entry["host"])
            return resolved

    class PublicConnection(HTTPConnection):
        public_client: aiohttp.ClientSession | None = None

        async def get_async_client(self):
            if self.public_client is None:
                self.public_client = aiohttp.ClientSession(connector=PublicConnector())
            return self.public_client

    class LimitedImageIO(ImageMediaIO):
        def load_bytes(self, data: bytes):
            self._check(BytesIO(data))
            return super().load_bytes(data)

        def load_file(self, filepath: Path):
            self._check(filepath)
            return super().load_file(filepath)

        @staticmethod
        def _check(source) -> None:
            with Image.open(source) as image:
                check_size(image.size)

    connection = PublicConnection()

    class LimitedConnector(MediaConnector):
        def __init__(self, *, allowed_local_media_path: str = ""):
            super().__init__(connection, allowed_local_media_path=allowed_local_media_path)

        async def fetch_image_async(self, image_url: str, *, image_mode: str = "RGB"):
            from vllm import envs

            media_io = LimitedImageIO(image_mode=image_mode)
            timeout = envs.VLLM_IMAGE_FETCH_TIMEOUT
            return await self._load("picture", self.load_from_url_async(image_url, media_io, fetch_timeout=timeout))

        async def fetch_video_async(self, video_url: str, **kwargs):
            return await self._load("video", super().fetch_video_async(video_url, **kwargs))

        @staticmethod
        async def _load(kind: str, loading):
            try:
                return await loading
            except ValueError:
                raise
            # Whatever a damaged file or a far server does is the request's fault, not this server's.
            except Exception as error:
                raise ValueError(f"a {kind} of the request cannot be loaded: {type(error).__name__}: {error}") from None

    return LimitedConnector
