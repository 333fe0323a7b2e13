"""Work leaves nothing behind: no page, no slot, no memory."""

import asyncio

import pytest

GROWTH = 1.05
CONCURRENT = 24


async def serve(api, reference, requests):
    """So many short requests; prompts repeat, as those of real applications do."""
    corpus, turn = reference.named("raw-2000").prompt, asyncio.Semaphore(CONCURRENT)

    async def one(number):
        async with turn:
            prompt = corpus[number % 1000 : number % 1000 + 2 + number % 30]
            found = await api.stream(prompt, max_tokens=1 + number % 6, temperature=0, ignore_eos=True)
            assert len(found.tokens) == 1 + number % 6

    await asyncio.gather(*(one(number) for number in range(requests)))


async def check_growth(api, cluster, reference, warm_up, requests):
    await serve(api, reference, warm_up)
    cluster.wait_idle()
    before = cluster.tree.resident_bytes()
    await serve(api, reference, requests)
    cluster.wait_idle()
    after = cluster.tree.resident_bytes()
    assert after.keys() == before.keys(), "a process was replaced"
    grown = {name: after[name] / before[name] for name in before}
    assert all(ratio < GROWTH for ratio in grown.values()), grown


@pytest.mark.timeout(300)
async def test_hundreds_of_requests_leave_nothing_behind(api, demo_cluster, reference):
    await check_growth(api, demo_cluster, reference, warm_up=150, requests=250)


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_two_thousand_requests_leave_nothing_behind(api, demo_cluster, reference):
    await check_growth(api, demo_cluster, reference, warm_up=500, requests=2000)
