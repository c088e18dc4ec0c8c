"""Preference within a group: a vision-language model compares every two images, in both orders (paper section 3.3; Pref-GRPO).

Comparing tells apart what marks from one to ten do not, and both orders take away what a judge likes about the first place.
"""

import asyncio
import base64
import hashlib
import io
import json
import os
import re
import threading
import time
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from runtime.exits import Plain
from training.rewards.config import PreferenceConfig
from training.rewards.scores import Group, Scores
from training.rewards.service import Breaker, Service, Unanswered

TEMPLATE = """You are given a prompt and two images that were made for it. Decide which image follows the prompt better and looks better.
Think within <think> and </think>: give each image a mark from 1 to 10 for each dimension that matters here, among them how well the image
agrees with the prompt, how consistent its objects are and how good it looks; add the marks up for Image 1 and for Image 2.
Then say the result within <answer> and </answer>, as exactly one of: Image 1 is better, Image 2 is better.

Prompt: {prompt}"""
ANSWER = re.compile(r"<answer>\s*Image ([12]) is better\.?\s*</answer>", re.IGNORECASE)
TEMPLATE_ID = hashlib.sha256(TEMPLATE.encode()).hexdigest()[:16]
ENOUGH = 20  # comparisons asked twice before their agreement says something


class JudgeChanged(Plain):
    """The judge is not the one that params.yaml names, or does not answer as it did."""


class Preference:
    """Win rate of each image among its comparisons with the others of its group, in [0, 1]; the group's mean is one half.

    A pair counts where both orders were answered; one that contradicts itself is half a win for each. What fails or can't be parsed is left
    out, and is no tie. It applies to text-to-image: an edit's instruction says nothing without its source.

    Args:
        cache: JSON lines of answers, written before they are used: a resumed run is answered as it was.

    Raises:
        JudgeChanged: the endpoint does not list the model.
    """

    names: tuple[str, ...] = ("preference",)

    def __init__(self, config: PreferenceConfig, cache: Path) -> None:
        self.config, self.lock = config, threading.Lock()
        headers = {}
        if config.api_key_env is not None:
            if config.api_key_env not in os.environ:
                raise Plain(f"mr_grpo.preference.api_key_env: the environment has no {config.api_key_env}. Set it, or say null.")
            headers["Authorization"] = f"Bearer {os.environ[config.api_key_env]}"
        breaker = Breaker(config.breaker_failures, config.breaker_s)
        self.service = Service("judge", config.attempts, config.concurrency, config.max_reply_bytes, breaker, headers)
        self.cache = Answers(cache)
        self.counts: Counter[str] = Counter()
        self.greeted = False

    def __call__(self, group: Group) -> Scores:
        if group.task != "text_to_image":
            return Scores.unasked(self.names, len(group.images))
        answers = self.service.run(self._compare(group))
        wins, valid = torch.zeros(2, len(group.images), len(group.images))
        with self.lock:
            for (i, j), said in answers.items():
                self.counts["pairs"] += 1
                if None in said:
                    continue
                self.counts["pairs_answered"] += 1
                first, second = said
                self.counts["first_place"] += (first == 1) + (second == 1)
                self.counts["contradictions"] += first == second  # the same place twice
                share = ((first == 1) + (second == 2)) / 2
                wins[i, j], wins[j, i] = share, 1 - share
                valid[i, j] = valid[j, i] = 1.0
        rates, there = win_rates(wins, valid, min(self.config.min_comparisons, len(group.images) - 1))
        return Scores(self.names, rates[:, None], there[:, None], torch.ones(len(group.images), 1, dtype=torch.bool))

    async def _compare(self, group: Group) -> dict[tuple[int, int], tuple[int | None, int | None]]:
        """(i, j) -> which of the two places won with i in the first, and with j in it; None where nobody said."""
        until = time.monotonic() + self.config.deadline_s
        urls = [as_url(image) for image in group.images]
        pairs = list(combinations(range(len(urls)), 2))
        async with self.service.session() as session:
            try:
                await self._greet(session, until)
            except Unanswered:
                return dict.fromkeys(pairs, (None, None))
            asked = [(i, j, order) for i, j in pairs for order in ((i, j), (j, i))]
            tasks = [
                asyncio.create_task(self._one(session, group, urls[a], urls[b], f"{group.name}:{a}-{b}", until)) for _, _, (a, b) in asked
            ]
            _, late = await asyncio.wait(tasks, timeout=max(0.0, until - time.monotonic()))
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        said = [None if task.cancelled() else task.result() for task in tasks]
        return {(i, j): (said[2 * n], said[2 * n + 1]) for n, (i, j) in enumerate(pairs)}

    async def _greet(self, session: Any, until: float) -> None:
        """Once: the endpoint lists the model that params.yaml names."""
        if self.greeted:
            return
        listed = await self.service.ask(session, "GET", f"{self.config.endpoint}/models", "models", until=until)
        try:
            names = sorted(str(model["id"]) for model in listed["data"])
        except (TypeError, KeyError) as error:
            raise Unanswered("no_models", again=False) from error
        if self.config.model not in names:
            raise JudgeChanged(
                f"mr_grpo.preference.model: {self.config.endpoint} serves {', '.join(names)[:200] or 'nothing'}, params.yaml names "
                f"{self.config.model}. Serve that, or name what is served; scores of two judges can't be compared."
            )
        self.greeted = True

    async def _one(self, session: Any, group: Group, first: str, second: str, request: str, until: float) -> int | None:
        """Which place won; from the cache where it is there."""
        key = hashlib.sha256("\n".join((self.config.model, TEMPLATE_ID, group.prompt, first, second)).encode()).hexdigest()
        known = self.cache.get(key)
        twice = int(key[:8], 16) / 16**8 < self.config.replay_share
        if known is None or twice:
            said = await self._said(session, group.prompt, first, second, request, until)
            if known is None and said is not None:
                self.cache.put(key, said)
                known, said = said, await self._said(session, group.prompt, first, second, request, until) if twice else None
            if said is not None and known is not None:
                self._replayed(said == known)
        return known

    async def _said(self, session: Any, prompt: str, first: str, second: str, request: str, until: float) -> int | None:
        texts = [{"type": "text", "text": TEMPLATE.format(prompt=prompt)}]
        for number, url in enumerate((first, second), 1):
            texts += [{"type": "text", "text": f"Image {number}:"}, {"type": "image_url", "image_url": {"url": url}}]  # type: ignore[dict-item]
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": texts}],
            "temperature": 0,
            "max_tokens": self.config.max_tokens,
        }
        try:
            reply = await self.service.ask(session, "POST", f"{self.config.endpoint}/chat/completions", request, body, until)
        except Unanswered:
            return None
        if isinstance(reply, dict) and reply.get("model", self.config.model) != self.config.model:
            raise JudgeChanged(
                f"mr_grpo.preference.model: {self.config.endpoint} answered as {str(reply['model'])[:100]!r}, params.yaml names "
                f"{self.config.model!r}. Scores of two judges can't be compared: serve that one again, or begin a new run."
            )
        self.counts["replies"] += 1
        place = parse_answer(reply)
        self.counts["parsed"] += place is not None
        return place

    def _replayed(self, agrees: bool) -> None:
        self.counts["replayed"] += 1
        self.counts["agreed"] += agrees
        share = self.counts["agreed"] / self.counts["replayed"]
        if self.counts["replayed"] >= ENOUGH and share < self.config.min_agreement:
            raise JudgeChanged(
                f"mr_grpo.preference: of {self.counts['replayed']} comparisons asked twice {share:.0%} had one answer, min_agreement is "
                f"{self.config.min_agreement:.0%}. Its sampling must be greedy and its weights stay; or lower min_agreement."
            )

    def facts(self) -> dict[str, float]:
        counts, row = self.counts, self.service.facts()
        self.counts = Counter({name: counts[name] for name in ("replayed", "agreed")})
        for name, part, whole in (
            ("parsed_share", "parsed", "replies"),
            ("answered_share", "pairs_answered", "pairs"),
            ("contradiction_share", "contradictions", "pairs_answered"),
            ("agreement", "agreed", "replayed"),
        ):
            if counts[whole]:
                row[f"judge/{name}"] = counts[part] / counts[whole]
        if counts["pairs_answered"]:
            row["judge/position_bias"] = counts["first_place"] / (2 * counts["pairs_answered"]) - 0.5
        return row


class Answers:
    """Which place won, by the hash of the question: a file of JSON lines. A line that a kill cut short is asked again."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock, self.held = path, threading.Lock(), dict[str, int]()
        if path.is_file():
            for line in path.read_text().split("\n"):
                try:
                    row = json.loads(line)
                    self.held[row["question"]] = int(row["place"])
                except (ValueError, TypeError, KeyError):
                    continue
        self.torn = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0

    def get(self, question: str) -> int | None:
        return self.held.get(question)

    def put(self, question: str, place: int) -> None:
        with self.lock, self.path.open("a") as file:
            file.write(("\n" if self.torn else "") + json.dumps({"question": question, "place": place}) + "\n")
            self.torn = False
            self.held[question] = place


def as_url(image: np.ndarray) -> str:
    """A uint8 (H, W, 3) image as PNG in a data URL."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def parse_answer(reply: Any) -> int | None:
    """1 or 2, the image that a chat completion calls better; None where it says neither, or both."""
    try:
        text = reply["choices"][0]["message"]["content"]
    except (TypeError, KeyError, IndexError):
        return None
    if not isinstance(text, str):
        return None
    places = {int(place) for place in ANSWER.findall(text.rpartition("</think>")[2])}
    return places.pop() if len(places) == 1 else None


def win_rates(wins: Tensor, valid: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Mean of each image's wins over those that it was compared with (G,), and whether they are `least` at least.

    Args:
        wins: (G, G) in [0, 1], wins[i, j] + wins[j, i] = 1 where they were compared.
        valid: (G, G), 1 where they were.
    """
    compared = valid.sum(1)
    return (wins * valid).sum(1) / compared.clamp_min(1), compared >= max(1, least)
