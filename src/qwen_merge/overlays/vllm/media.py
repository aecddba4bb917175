"""What a chat request may make the server load: pictures that decode, of a bounded size, from public addresses.

vLLM 0.9.1 and 0.12 fetch any http(s) URL a client names, private networks included, decode pictures of any size, and
answer 500 when a fetch fails or a file is damaged. For this kit's models each of these is a clear 400. A local file is
refused by vLLM itself unless `--allowed-local-media-path` allows its folder.

Environment variables: QWEN_MERGE_ALLOW_PRIVATE_MEDIA=1 fetches from private networks too; QWEN_MERGE_MAX_IMAGE_PIXELS
(default 64,000,000) bounds width times height; a video's frame may have a quarter of that. PIL itself stops at
178,956,970. Proxies of the environment are not used: behind one, its address is all that could be checked.
"""

import os
from functools import wraps
from io import BytesIO
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

from qwen_merge.overlays.vllm import MODEL_TYPES

DEFAULT_MAX_PIXELS = 64_000_000
MAX_BYTES = 256 << 20  # of a fetched file
NAT64 = ip_network("64:ff9b::/96")


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
        if tracker.model_config.hf_config.model_type in MODEL_TYPES:
            connector_class = connector_class or _limited_connector_class()
            newer = ("media_io_kwargs", "allowed_media_domains")  # options that vLLM 0.12 has and 0.9.1 does not
            options = {name: getattr(self._connector, name) for name in newer if hasattr(self._connector, name)}
            path = tracker.allowed_local_media_path
            self._connector = connector_class(allowed_local_media_path=path, **options)

    init.__dict__["limits_media"] = True
    AsyncMultiModalContentParser.__init__ = init


def max_pixels() -> int:
    """The limit in force.

    Raises:
        ValueError: the environment variable is no number.
    """
    text = os.environ.get("QWEN_MERGE_MAX_IMAGE_PIXELS", str(DEFAULT_MAX_PIXELS))
    if not text.isdecimal():
        raise ValueError(f"QWEN_MERGE_MAX_IMAGE_PIXELS is {text!r}; expected a whole number of pixels.")
    return int(text)


def check_size(size: tuple[int, int], *, video: bool = False) -> None:
    """Refuse a picture, or a video by its frames, by its (width, height), before a pixel of it is decoded.

    Raises:
        ValueError: more pixels than allowed.
    """
    limit = max_pixels() // (4 if video else 1)
    if size[0] * size[1] > limit:
        raise ValueError(
            f"a {'video' if video else 'picture'} has {size[0]} x {size[1]} = {size[0] * size[1]:,} pixels; at most "
            f"{limit:,} are allowed. Send it smaller; the model scales it down in any case."
        )


def is_public(address: str) -> bool:
    """Whether packets to this address leave for the public internet, also when it wraps an IPv4 address."""
    found: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in NAT64:
            inner = IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            found = inner
        elif found.is_site_local or int(found) >> 32 == 0:  # the latter: IPv4-compatible addresses, long retired
            return False
    return found.is_global and not found.is_multicast


def check_address(host: str, address: str) -> None:
    """Refuse an address that is not public.

    Raises:
        ValueError: loopback, private, link-local and the like.
    """
    if not is_public(address) and os.environ.get("QWEN_MERGE_ALLOW_PRIVATE_MEDIA") != "1":
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
    from vllm.multimodal.video import OpenCVVideoBackend, VideoMediaIO

    max_pixels()  # a wrong limit is the server's fault, not the first client's

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

        async def async_get_bytes(self, url, *, timeout=None, **options):
            async with await self.get_async_response(url, timeout=timeout, **options) as response:
                response.raise_for_status()
                data = bytearray()
                async for chunk in response.content.iter_chunked(1 << 20):
                    data += chunk
                    if len(data) > MAX_BYTES:
                        raise ValueError(f"the file at {url} has more than {MAX_BYTES:,} bytes.")
                return bytes(data)

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

    class LimitedVideoIO(VideoMediaIO):
        """`num_frames` frames at the most are kept of a video; here of a list of JPEGs too."""

        def load_bytes(self, data: bytes):
            import cv2

            source: Any = BytesIO(data)
            capture = cv2.VideoCapture(source, OpenCVVideoBackend().get_cv2_video_api(), [])
            try:
                size = [int(capture.get(side)) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)]
            finally:
                capture.release()
            check_size((size[0], size[1]), video=True)
            return super().load_bytes(data)

        def load_base64(self, media_type: str, data: str):
            if media_type.lower() == "video/jpeg" and data.count(",") >= self.num_frames:
                raise ValueError(f"a video has {data.count(',') + 1} pictures; at most {self.num_frames} are allowed.")
            return super().load_base64(media_type, data)

    connection = PublicConnection()

    class LimitedConnector(MediaConnector):
        media_io_kwargs: dict[str, dict]

        def __init__(self, **options):
            self.media_io_kwargs = {}
            super().__init__(connection=connection, **options)

        async def fetch_image_async(self, image_url: str, *, image_mode: str = "RGB"):
            from vllm import envs

            media_io = LimitedImageIO(image_mode=image_mode, **self.media_io_kwargs.get("image", {}))
            timeout = envs.VLLM_IMAGE_FETCH_TIMEOUT
            return await self._load("picture", self.load_from_url_async(image_url, media_io, fetch_timeout=timeout))

        async def fetch_video_async(self, video_url: str, *, image_mode: str = "RGB", num_frames: int = 32):
            from vllm import envs

            video = {"num_frames": num_frames, **self.media_io_kwargs.get("video", {})}
            media_io = LimitedVideoIO(LimitedImageIO(image_mode=image_mode), **video)
            timeout = envs.VLLM_VIDEO_FETCH_TIMEOUT
            return await self._load("video", self.load_from_url_async(video_url, media_io, fetch_timeout=timeout))

        def fetch_image_embedding(self, data: str):
            # Features of a wrong shape stop the engine, and reading them unpickles what a client sent.
            raise ValueError("image_embeds are not accepted; send the picture itself.")

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
