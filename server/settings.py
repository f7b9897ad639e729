"""Every setting of the server: name, unit, default. The only reader of the environment.

A setting `max_seqs` is the option `--max-seqs` and the variable `MEDLEY_MAX_SEQS`; an option wins over its
variable. `Settings` is built once, at the edge (the command line), and frozen: the parts of the server take
the plain values that they use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic_settings import BaseSettings, SettingsConfigDict

GIB = 1024**3
MIB = 1024**2


class Settings(BaseSettings):
    """What `medley serve` runs with."""

    model_config = SettingsConfigDict(
        env_prefix="MEDLEY_", env_ignore_empty=True, frozen=True, extra="ignore", allow_inf_nan=False
    )

    model: str | None = Field(None, description="hub id or folder of the base; absent: the bundled demo base")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 picks a free one")
    auth: bool = Field(False, description="ask every caller for an API key, made by `medley keys create`")
    insecure: bool = Field(False, description="let anyone who reaches another address than loopback do everything")
    redis_url: str | None = Field(None, description="index; absent: a private Redis in the data folder")
    store: str | None = Field(
        None, description="blob store: a folder or s3://bucket/prefix; absent: `blobs` in the data folder"
    )
    store_cache: PositiveFloat = Field(10.0, description="GiB of a bucket's blobs that are kept in the data folder")
    garbage_grace: NonNegativeFloat = Field(86_400.0, description="seconds until a blob that nobody names is deleted")
    data_dir: Path = Field(Path("medley-data"), description="folder of everything this server keeps")

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the base runs")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the base; auto: float32 on CPU, the model's own on CUDA"
    )
    max_seqs: PositiveInt = Field(256, description="rows of one step")
    max_batch_tokens: PositiveInt = Field(2048, description="tokens of one step, running streams' and prompts'")
    max_prefill_tokens: PositiveInt | None = Field(
        None,
        description="prompt tokens that one step computes beside the running streams, which wait for them; longer "
        "prompts are cut into chunks; absent: 144 on CPU, 2048 on CUDA",
    )
    max_model_len: PositiveInt | None = Field(
        None, description="positions of one request, virtual ones counted; absent: the model's own"
    )
    kv_cache_memory: PositiveFloat | None = Field(
        None, description="GiB of KV pages; absent: a quarter of the free memory"
    )
    adapter_memory: PositiveFloat = Field(1.0, description="GiB of resident adapters")
    page_size: PositiveInt = Field(16, description="tokens of one KV page")

    max_queue: PositiveInt = Field(1024, description="requests that may wait; one more gets 429")
    max_choices: PositiveInt = Field(16, description="largest `n` of one request")
    max_uploads: PositiveInt = Field(8, description="uploads at once; one more gets 429")
    max_batch_requests: PositiveInt = Field(256, description="prompts or items of one HTTP request")
    max_score_choices: PositiveInt = Field(512, description="choices of one scoring request")
    max_body_bytes: PositiveInt = Field(8 * MIB, description="bytes of one JSON body")
    max_upload_bytes: PositiveInt = Field(512 * MIB, description="bytes of one uploaded adapter")
    request_timeout: PositiveFloat = Field(600.0, description="seconds from acceptance to the last token")
    drain_timeout: PositiveFloat = Field(30.0, description="seconds that running requests get at shutdown")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level logged")
    log_format: Literal["text", "json"] = Field("text", description="one line per event, for people or machines")


class ClientSettings(BaseSettings):
    """Where the client commands find the server."""

    model_config = SettingsConfigDict(env_prefix="MEDLEY_", env_ignore_empty=True, frozen=True, extra="ignore")

    url: str = Field("http://127.0.0.1:8000", description="the server")
    api_key: str | None = Field(None, description="sent as a bearer token")
