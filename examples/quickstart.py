"""The shortest useful client: `mtp-router pull smollm2`, `mtp-router serve`, then run this."""

from router.client import Client

with (
    Client("127.0.0.1:50061") as client,
    client.stream("smollm2", messages=[{"role": "user", "content": "Why is the sky blue?"}]) as answer,
):
    for delta in answer:
        print(delta.text, end="", flush=True)
    print(f"\n\nanswered by {answer.started.route.backend}: {answer.started.route.reason}")
