"""Settings of rewards that ask somebody else."""

import re

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator

from runtime.settings import Settings


class PreferenceConfig(Settings):
    """A vision-language model that says which of two images is better, behind any OpenAI-compatible endpoint."""

    endpoint: str = Field(description="URL of its API, such as http://127.0.0.1:8000/v1; images and prompts are sent there")
    model: str = Field(min_length=1, description="as /models lists it, with its version; another one in a reply stops the stage")
    api_key_env: str | None = Field(None, description="environment variable that holds the key; null: none is sent")
    deadline_s: PositiveFloat = Field(600.0, description="for all comparisons of a group; what is not answered by then is missing")
    attempts: PositiveInt = Field(3, description="of a comparison, the first included")
    concurrency: PositiveInt = Field(32, description="requests under way, of all groups together")
    min_comparisons: PositiveInt = Field(3, description="others that an image must have been compared with, or its score is missing")
    breaker_failures: PositiveInt = Field(20, description="failures in a row after which nothing is asked for breaker_s")
    breaker_s: NonNegativeFloat = Field(30.0, description="seconds until one request tries whether it answers again")
    max_reply_bytes: PositiveInt = 1_000_000
    max_tokens: PositiveInt = 4096
    replay_share: float = Field(0.01, ge=0.0, le=1.0, description="of the comparisons that are asked twice, to see whether they agree")
    min_agreement: float = Field(0.8, ge=0.0, le=1.0, description="share of those that must; less, of at least 20, stops the stage")

    @field_validator("endpoint")
    @classmethod
    def _endpoint_is_a_plain_url(cls, endpoint: str) -> str:
        if not re.fullmatch(r"https?://[^/@\s]+(/[^@\s?#]*)?", endpoint):
            raise ValueError(f"{endpoint!r} given; allowed: an http or https URL without user, query or fragment")
        return endpoint.rstrip("/")
