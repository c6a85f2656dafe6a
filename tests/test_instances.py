"""Several adapters of one method in one denoiser, and edits of the pipeline beyond it."""

from typing import Any

import pytest
import torch
from methods import EditsAdapter, EditsBinding
from tiny import draw

from interactdiff import AdapterError, attach
from interactdiff.adapter import Host, Residual
from interactdiff.adapter_loading import chosen_adapters, load_adapters
from interactdiff.commands.arguments import adapters_of
from interactdiff.generation import ScenePipeline


def raising(amount: float) -> EditsAdapter:
    """Adds a number to what every cross-attention gathers."""
    return EditsAdapter(
        lambda host: [Residual(site, lambda _, out: out + amount) for site in host.sites_of("cross")], "toy"
    ).eval()


def test_two_of_one_method_have_names_of_their_own(pipe: Any) -> None:
    plain, one, other = draw(pipe), raising(0.3).named("one"), raising(-0.5).named("other")
    assert (one.name, one.method) == ("toy:one", "toy")
    with attach(pipe, other, one) as handle:
        assert list(handle) == ["toy:other", "toy:one"]
        both = draw(pipe)
        with pytest.raises(AdapterError, match="expected an adapter of this handle"):
            handle["toy"]
        handle.detach("toy:other")
        assert handle["toy"] is handle["toy:one"]
        assert not torch.equal(draw(pipe), both)
    with attach(pipe, one), attach(pipe, other):
        assert torch.equal(draw(pipe), both)
    assert torch.equal(draw(pipe), plain)


def test_two_without_names_are_refused(pipe: Any) -> None:
    with pytest.raises(AdapterError, match=r"expected a denoiser without toy attached.*named"):
        attach(pipe, raising(0.1), raising(0.2))
    with pytest.raises(AdapterError, match="expected a name of letters"):
        raising(0.1).named("a/b")


def test_what_a_binding_installs_is_undone_in_any_order_and_after_an_error(pipe: Any) -> None:
    log: list[str] = []

    class Installing(EditsBinding):
        def install(self) -> None:
            log.append(f"+{self.adapter.name}")
            if self.adapter.name == "toy:bad":
                raise AdapterError("expected more")

        def uninstall(self) -> None:
            log.append(f"-{self.adapter.name}")

    class Adapter(EditsAdapter):
        def bind(self, host: Host) -> EditsBinding:
            return Installing(self, host)

    def made(name: str) -> Any:
        return Adapter(lambda host: [], "toy").named(name)

    handle = attach(pipe, made("a"), made("b"))
    handle.detach("toy:b")
    handle.detach()
    assert log == ["+toy:a", "+toy:b", "-toy:b", "-toy:a"]
    log.clear()
    with pytest.raises(AdapterError, match="expected more"):
        attach(pipe, made("a"), made("bad"))
    assert log == ["+toy:a", "+toy:bad", "-toy:a", "-toy:bad"]
    assert not pipe.unet._forward_pre_hooks, "something stayed attached"


def test_front_ends_name_instances(badge: Any, badge_weights: Any, pipe: Any) -> None:
    class Args:
        adapter = (f"badge={badge_weights}", f"badge:second={badge_weights}", "somewhere")

    named = adapters_of(Args)  # type: ignore[arg-type]
    assert list(named) == ["badge", "badge:second", "interaction"]
    del named["interaction"]
    chosen = chosen_adapters("somewhere", named)
    loaded = load_adapters(chosen)
    assert [one.name for one in loaded.values()] == ["badge", "badge:second"]
    scenes = ScenePipeline.attached(pipe, "somewhere", chosen, loaded)
    assert scenes.checked_settings({"badge": {"gain": 2.0}}) == {"badge": {"gain": 2.0}}
    scenes.detached()
