"""Codes of samples, translation, retrieval. Seeds are fixed."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from distmatch.base.errors import UserError
from distmatch.diffusion.control.neighbor_sets import NeighborConditioned, SetEmbedding
from distmatch.diffusion.control.retrieval import NeighborDenoiser, NeighborStore
from distmatch.diffusion.control.translate import decode, encode, translate
from distmatch.diffusion.guidance import Guided
from distmatch.diffusion.mixture import GaussianMixture
from distmatch.diffusion.noise_streams import SampleNoise
from distmatch.diffusion.solvers import grid, solve
from distmatch.nets.config import MLPConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.mlp import MLP
from tests.helpers.draws import normal

CATS = GaussianMixture([0.5, 0.5], [[-2.0, 1.0], [-2.0, -1.0]], [0.1, 0.1])
DOGS = GaussianMixture([0.5, 0.5], [[2.0, 1.0], [2.0, -1.0]], [0.1, 0.1])
LEVELS = grid("karras", 40, 0.01, 20.0)


def noise_for(n: int) -> SampleNoise:
    return SampleNoise(0, torch.arange(n), (2,))


@pytest.mark.parametrize("eta", [0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_code_gives_its_sample_back(eta: float, dtype: torch.dtype) -> None:
    x = CATS.sample(100, seed=1).to(dtype)
    code = encode(CATS, x, LEVELS, noise_for(100), eta=eta)
    assert float((decode(CATS, code, dtype=dtype) - x).abs().max()) < 1e-5
    assert code.noises.shape == (40, 100, 2)


def test_a_code_is_the_noise_of_the_sampler() -> None:
    """Decoding is DDIM with the codes for noise: with real noise in their place it is the solver."""
    n = 30
    code = encode(CATS, CATS.sample(n).double(), LEVELS, noise_for(n), eta=0.5)
    noises = torch.stack([noise_for(n).normal(k) for k in range(40)])
    noises[-1] = 0
    mine = decode(CATS, type(code)(code.start, noises, code.levels, 0.5), dtype=torch.float64)
    theirs = solve(CATS, code.start, LEVELS, "ddim:0.5", noise=noise_for(n)).y
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.statistical
def test_codes_are_normal_for_the_models_own_samples_and_not_for_others() -> None:
    """Over fine steps the codes of on-model samples are unit normal; samples far off need longer ones."""
    n, levels = 400, grid("log", 300, 0.05, 20.0)
    own, far = CATS.sample(n).double(), DOGS.sample(n).double() + 3
    codes = [encode(CATS, x, levels, noise_for(n), eta=1.0).noises[:-1] for x in (own, far)]
    sizes = [float(c.square().mean()) for c in codes]
    assert abs(sizes[0] - 1) < 0.02
    assert sizes[1] > 1.05


@pytest.mark.statistical
@pytest.mark.parametrize("eta", [0.1, 1.0])
def test_codes_have_the_size_of_noise_and_of_what_the_model_is_off_by(eta: float) -> None:
    """E e^2 = 1 + ((1 - k) / c)^2 Var[x0 | y]: 57 in the worst step of this grid at eta 0.1, not 1."""
    n, variance = 4000, 0.1
    model = GaussianMixture([1.0], [[-1.5, 0.0]], [variance])
    levels = grid("karras", 40, 0.01, 80.0)
    noises = encode(model, model.sample(n).double(), levels, noise_for(n), eta=eta).noises[:-1]
    expected = []
    for now, after in pairwise(levels[:-1].tolist()):
        c = eta * after * math.sqrt(1 - (after / now) ** 2)
        k = math.sqrt(after**2 - c**2) / now
        expected.append(1 + ((1 - k) / c) ** 2 * variance * now**2 / (variance + now**2))
    ratio = noises.square().mean((1, 2)) / torch.tensor(expected)
    # 2 n squares of normals a step; 4 standard errors.
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=4 * math.sqrt(1 / n))
    assert max(expected) == pytest.approx(56.7 if eta == 0.1 else 2.47, rel=0.01)


def test_translation_takes_a_sample_to_the_other_domain_and_keeps_what_they_share() -> None:
    """From left to right; up stays up and down stays down, which independent samples would not."""
    n = 300
    x = CATS.sample(n, seed=2).double()
    moved = translate(CATS, DOGS, x, LEVELS, noise_for(n), eta=0.1)
    assert float((moved[:, 0] > 1).double().mean()) > 0.99
    assert float((moved[:, 1].sign() == x[:, 1].sign()).double().mean()) > 0.9
    torch.testing.assert_close(translate(CATS, CATS, x, LEVELS, noise_for(n)), x, rtol=0, atol=1e-9)


def test_wrong_codes_are_refused() -> None:
    x, noise = torch.zeros(3, 2), noise_for(3)
    with pytest.raises(UserError, match=r"eta must be in \(0, 1\]"):
        encode(CATS, x, LEVELS, noise, eta=0.0)
    with pytest.raises(UserError, match="must end at sigma 0"):
        encode(CATS, x, LEVELS[:-1], noise)
    with pytest.raises(UserError, match="samples of this model"):
        encode(CATS, torch.zeros(3, 5), LEVELS, noise)
    with pytest.raises(UserError, match="not for this batch"):
        encode(CATS, x, LEVELS, noise_for(4))
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match="one condition for each"):
        encode(CATS, x, LEVELS, noise, conditioning=labels)
    with pytest.raises(UserError, match="one condition for each"):
        decode(CATS, encode(CATS, x, LEVELS, noise), conditioning=labels)
    other = GaussianMixture([1.0], [[0.0, 0.0, 0.0]], [1.0])
    with pytest.raises(UserError, match="one shape"):
        translate(CATS, other, x, LEVELS, noise)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_store_finds_the_nearest_whatever_the_chunks(metric: str) -> None:
    rows, queries = normal(57, 4), normal(23, 4, seed=1)
    store = NeighborStore(rows, metric)  # type: ignore[arg-type]
    found = store.search(queries, 5)
    apart = torch.stack([(queries[:, None] - rows).norm(dim=2)])[0]
    if metric == "cosine":
        apart = 1 - torch.nn.functional.cosine_similarity(queries[:, None], rows[None], dim=2)
    distances, indices = apart.sort(dim=1)
    assert torch.equal(found.indices, indices[:, :5])
    torch.testing.assert_close(found.distances, distances[:, :5])
    for chunk in (3, 10):
        assert torch.equal(store.search(queries, 5, chunk=chunk).indices, found.indices)


def test_a_row_is_not_its_own_neighbor_but_its_double_is() -> None:
    rows = normal(40, 3)
    rows[7] = rows[21]
    store, every = NeighborStore(rows), torch.arange(40)
    alone = store.neighbors_of_rows(every, 4, chunk=9)
    assert not bool((alone.indices == every[:, None]).any())
    assert int(alone.indices[7, 0]) == 21
    assert float(alone.distances[7, 0]) == 0
    assert bool((store.search(rows, 2).indices == every[:, None]).any(1).all())
    free = store.search(rows[:1], 39, exclude=torch.tensor([-1]))
    assert 0 in free.indices
    equal = NeighborStore(torch.ones(6, 2)).search(torch.ones(1, 2), 4, chunk=2)
    assert equal.indices.tolist() == [[0, 1, 2, 3]]


def test_wrong_searches_are_refused() -> None:
    store = NeighborStore(normal(5, 3))
    with pytest.raises(UserError, match="lengths of the embeddings"):
        store.search(normal(2, 4), 1)
    with pytest.raises(UserError, match="from 1 to 4"):
        store.neighbors_of_rows(torch.arange(5), 5)
    with pytest.raises(UserError, match="finite"):
        NeighborStore(torch.full((2, 2), math.nan))
    with pytest.raises(UserError, match="rows of the store"):
        NeighborDenoiser(normal(5, 3), torch.tensor([[5]]))


VALUES = normal(30, 2, seed=3)
NEAR = NeighborStore(VALUES).neighbors_of_rows(torch.arange(30), 4).indices


def test_the_denoiser_of_neighbors_is_that_of_their_mixture() -> None:
    teacher = NeighborDenoiser(VALUES, NEAR, bandwidth=0.3)
    y, sigma = 2 * normal(6, 2, seed=4), torch.linspace(0.1, 3, 6, dtype=torch.float64)
    for q in (0, 17):
        mixture = GaussianMixture([0.25] * 4, VALUES[NEAR[q]], [0.09] * 4)
        query = torch.full((6,), q)
        torch.testing.assert_close(teacher(y, sigma, query), mixture(y, sigma), rtol=1e-9, atol=1e-9)
        shuffled = NeighborDenoiser(VALUES, NEAR.flip(1), bandwidth=0.3)
        torch.testing.assert_close(shuffled(y, sigma, query), teacher(y, sigma, query))
    whole = GaussianMixture([1 / 30] * 30, VALUES, [0.09] * 30)
    torch.testing.assert_close(teacher(y, sigma), whole(y, sigma), rtol=1e-9, atol=1e-9)
    empty = torch.full((6,), -1)
    torch.testing.assert_close(teacher(y, sigma, empty), teacher(y, sigma), rtol=0, atol=0)
    guided = Guided(teacher, 1.5)(y, sigma, torch.full((6,), 17))
    expected = 1.5 * teacher(y, sigma, torch.full((6,), 17)) - 0.5 * teacher(y, sigma)
    torch.testing.assert_close(guided, expected)


def test_samples_of_a_neighborhood_are_near_it() -> None:
    teacher, queries = NeighborDenoiser(VALUES, NEAR), torch.arange(30)
    y = 80 * normal(30, 2)
    x = solve(teacher, y, grid("karras", 25, 0.002, 80.0), "heun", conditioning=queries).y
    apart = (x[:, None] - VALUES[NEAR]).norm(dim=2).amin(1)
    assert float(apart.max()) < 0.02


def small_net() -> NeighborConditioned:
    torch.manual_seed(0)
    inner = MLP(MLPConfig(width=64, depth=2), (2 + 6,), 0)
    return NeighborConditioned(inner, SetEmbedding(2, 32, 6), VALUES.float(), NEAR)


def test_a_set_has_no_order_and_the_empty_set_is_its_own() -> None:
    net = small_net()
    torch.nn.init.normal_(net.net.last.weight)
    x, c, labels = torch.randn(5, 2), torch.zeros(5), torch.tensor([3, 3, -1, 8, -1])
    out = net(x, c, labels)
    net.use_store(VALUES, NEAR.flip(1))
    torch.testing.assert_close(net(x, c, labels), out)
    torch.testing.assert_close(net(x, c, None)[2::2], out[2::2])
    assert float((net(x, c, None) - out).detach()[[0, 1, 3]].abs().min()) > 0
    members = torch.randn(2, 3, 2)
    some = torch.tensor([[True, True, False], [True, True, True]])
    torch.testing.assert_close(net.sets(members, some)[0], net.sets(members[:1, :2])[0])
    assert net(x, c, labels, return_features=True)[0].shape == (5, 2)
    pictures = NeighborConditioned(torch.nn.Identity(), SetEmbedding(2, 8, 4), VALUES.float(), NEAR)
    wide = pictures._widened(torch.zeros(2, 3, 5, 5), torch.tensor([1, -1]))
    assert wide.shape == (2, 7, 5, 5)


def test_a_network_takes_another_store_in_one_call_and_refuses_rows_of_one_that_it_does_not_have() -> None:
    net = small_net()
    torch.nn.init.normal_(net.net.last.weight)
    x, c, labels = torch.randn(4, 2), torch.zeros(4), torch.tensor([0, 1, 2, -1])
    before = net(x, c, labels)
    other = NeighborStore(VALUES.flip(0)[:20].float() + 1)
    queries = torch.randn(3, 2, generator=torch.Generator().manual_seed(5))
    found = other.search(queries, 2)
    for wrong, message in ((found, "another store"), (found.indices, "identify their store")):
        with pytest.raises(UserError, match=message):
            net.use_neighbors(wrong)  # type: ignore[arg-type]
    for store, rows in ((VALUES, torch.tensor([[30]])), (VALUES[:, :1], NEAR), (VALUES, NEAR.double())):
        with pytest.raises(UserError, match=r"rows of the store|embeddings are not compatible"):
            net.use_store(store, rows)
    assert torch.equal(net(x, c, labels), before)  # a refusal changes nothing

    net.use_store(found.embeddings, found.indices)
    fresh = NeighborConditioned(net.net, net.sets, found.embeddings, found.indices)
    assert torch.equal(net(x, c, labels), fresh(x, c, labels))
    assert float((net(x, c, labels) - before)[:3].detach().abs().min()) > 0
    assert torch.equal(net(x, c, None), small_like(net)(x, c, None))  # the empty set knows no store

    again = NeighborStore(VALUES.float()).search(queries, 3)
    net = small_net()
    net.use_neighbors(again)  # other queries of the same store
    assert torch.equal(net.neighbors, again.indices)


def small_like(net: NeighborConditioned) -> NeighborConditioned:
    return NeighborConditioned(net.net, net.sets, VALUES.float(), NEAR)


def test_a_network_learns_from_the_neighbors() -> None:
    """Trained on kernels at the rows, the net with its sets comes near the exact denoiser of sets at level 1,
    much nearer than the best that ignores them."""
    net = small_net()
    model = EDMDenoiser(net, shape=(2,), num_classes=30, sigma_data=1.0)
    exact = NeighborDenoiser(VALUES.float(), NEAR, bandwidth=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    gen = torch.Generator().manual_seed(1)
    sigma = torch.ones(256)
    for _ in range(250):
        labels = torch.randint(30, (256,), generator=gen)
        member = NEAR[labels, torch.randint(4, (256,), generator=gen)]
        clean = VALUES.float()[member] + 0.1 * torch.randn(256, 2, generator=gen)
        y = clean + torch.randn(256, 2, generator=gen)
        loss = (model(y, sigma, labels) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        learned = (model(y, sigma, labels) - exact(y, sigma, labels)).square().mean()
        ignorant = (exact(y, sigma) - exact(y, sigma, labels)).square().mean()
    assert float(learned) < 0.15 * float(ignorant)
