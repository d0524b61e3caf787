"""The page on reward services: its examples of the format are read by the code, and its service is one."""

from __future__ import annotations

import json
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import scripts
import torch
from reading import DOCS, blocks

from corefit.types import wire
from corefit_rewards.remote import Remote

PAGE = DOCS / "plugins" / "reward-service.md"


def test_the_examples_of_the_format_are_of_the_format():
    health, request, answer = (json.loads(block.text) for block in blocks(PAGE, "json"))
    told = wire.read_health(health)
    samples = wire.read_request(json.dumps(request).encode(), 100)
    assert [one.media.shape for one in samples if isinstance(one, wire.Sample)] == [(3, 1, 1), (3, 1, 1, 1)]
    read = wire.read_answer(answer, [one.id for one in samples])
    assert read.version == told.version
    assert json.loads(wire.write_answer(read)) == answer
    assert json.loads(wire.write_health(told)) == health


def test_the_service_of_the_page_is_one(tmp_path: Path):
    file = tmp_path / "service_of_the_page.py"
    file.write_text("\n".join(block.text for block in blocks(PAGE, "python")))
    page = scripts.load(file)
    page.Handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), page.Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        reward = Remote(url=f"http://127.0.0.1:{server.server_port}", retries=0)
        reward.check()
        media = torch.rand(3, 3, 2, 4, 4)
        rounded = (media * 255).round().double() / 255
        assert torch.allclose(reward.score(media, ["a"] * 3, [{}] * 3), rounded.flatten(1).mean(1), atol=1e-12)
        assert reward.scores_key() == page.VERSION
    finally:
        server.shutdown()
        server.server_close()
