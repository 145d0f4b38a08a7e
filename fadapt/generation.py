"""Generation with transformers, each prompt wearing its own adapter.

``model.generate`` runs as it is, over the shell of a mixed batch: every decoding strategy, cache
and stopping rule is transformers' own. Only sampling draws its numbers elsewhere: transformers
reads the global random state, in which a prompt's tokens would depend on the rest of the batch.
"""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fadapt.bank import Bank, listed
from fadapt.batching import Mixed, bind_mixed
from fadapt.errors import AdapterError, ConfigError
from fadapt.random import hashed_uniform


def generate(
    model: nn.Module | Mixed,
    bank: Bank,
    names: Iterable[str],
    *,
    seed: int | Sequence[int] | torch.Generator | None = None,
    **inputs_and_options: Any,
) -> Any:
    """``model.generate``, prompt i wearing the adapter ``names[i]``.

    In float32 each prompt gets the tokens that it gets alone: prompts of different lengths are
    padded on the left, with an ``attention_mask``, as transformers wants it.

    Args:
        model: one of transformers' models; or what ``bind_mixed(model, bank.method)`` returned, to
            bind once for many calls. Left as it is, and so is every random state.
        bank: the adapters.
        names: of each prompt's adapter; ``"base"`` for none.
        seed: for ``do_sample=True``: a number for all prompts, one for each, or a generator to draw
            them from. A prompt's samples depend on its seed, and on no other prompt; equal prompts
            with equal seeds get equal samples, except those of one ``num_return_sequences``.
        **inputs_and_options: what ``model.generate`` takes: ``input_ids [n, tokens]``,
            ``attention_mask``, ``max_new_tokens``, ``num_beams``, ...

    Returns:
        What ``model.generate`` returns.

    Raises:
        AdapterError: a name that the bank does not have, an adapter on the host (see
            :meth:`Bank.page`), not one name a prompt, or no prompt; a forward that was bound with
            another method than the bank's.
        ConfigError: sampling without a seed, or with beams; a seed without sampling.
    """
    options = dict(inputs_and_options)
    module = model.shell if isinstance(model, Mixed) else model
    if not hasattr(module, "generate"):
        raise AdapterError(f"{type(module).__name__} has no generate(); transformers' models have.")
    mixed = model if isinstance(model, Mixed) else bind_mixed(model, bank.method)
    if mixed.method != bank.method:
        raise AdapterError(
            "this forward was bound with another method than the bank's, and would scale and place "
            "its adapters otherwise: bind_mixed(model, bank.method)."
        )
    shell: Any = mixed.shell
    names = listed(names)
    config = options.get("generation_config") or shell.generation_config
    sampling = _option(options, config, "do_sample", False)
    copies = _option(options, config, "num_return_sequences", 1)
    beams = _option(options, config, "num_beams", 1)
    _check_batch(options, names)
    if sampling:
        if beams > 1:
            raise ConfigError(
                "do_sample=True with num_beams > 1 draws over all beams at once from the global "
                "random state: sample without beams, or search without sampling."
            )
        if "custom_generate" in options:
            raise ConfigError("custom_generate= draws numbers of its own: it takes no seed.")
        seeds = _seeds(seed, len(names), copies)
        options["custom_generate"] = _sampler(seeds)
    elif seed is not None:
        raise ConfigError("seed= was given, but nothing is sampled: pass do_sample=True.")
    ids = bank.ids(names)
    repeats = max(beams, copies)
    if repeats > 1 and shell.config.is_encoder_decoder and "encoder_outputs" not in options:
        # The encoder sees each prompt once, the decoder each beam.
        encoder = shell.get_encoder()
        with torch.no_grad():
            inputs = _encoder_inputs(encoder, options)
            options["encoder_outputs"] = mixed.run(bank.params, ids, (), inputs, encoder)
    each = [k for k in ids for _ in range(repeats)]
    return mixed.run(bank.params, each, (), options, shell.generate)


def _encoder_inputs(encoder: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    takes = inspect.signature(encoder.forward).parameters
    if "attention_mask" in takes and options.get("attention_mask") is None:
        raise ConfigError(
            "an encoder with num_beams or num_return_sequences above 1: pass attention_mask=, from "
            "which it is seen what is padding."
        )
    return {k: v for k, v in options.items() if k in takes and isinstance(v, Tensor)}


def _sampler(seeds: Tensor) -> Any:
    """Of transformers' ``custom_generate``: its own loop, with numbers that are ours.

    The largest of ``score + Gumbel noise`` is a sample of ``softmax(score)`` (Maddison et al. 2014,
    arXiv:1411.0030); so the loop searches greedily, and reads no random state.
    """

    def decode(
        model: Any, input_ids: Tensor, logits_processor: Any, generation_config: Any, **rest: Any
    ) -> Any:
        start = input_ids.shape[1]

        def noisy(tokens: Tensor, scores: Tensor) -> Tensor:
            u = hashed_uniform(seeds.to(scores.device), tokens.shape[1] - start, scores.shape[-1])
            return scores - torch.log(-torch.log(u)).to(scores.dtype)

        generation_config.do_sample = False  # generate() made it for this call
        processors = type(logits_processor)([*logits_processor, noisy])
        return type(model)._sample(
            model,
            input_ids,
            logits_processor=processors,
            generation_config=generation_config,
            **rest,
        )

    return decode


def _seeds(seed: int | Sequence[int] | torch.Generator | None, n: int, copies: int) -> Tensor:
    """``[n * copies]``, the copies of one prompt side by side."""
    if seed is None:
        raise ConfigError(
            "do_sample=True draws numbers: pass seed= (one for all, one a prompt, or a generator)."
        )
    if isinstance(seed, torch.Generator):
        seeds = torch.randint(0, 2**31, (n,), generator=seed, device=seed.device).cpu()
    else:
        each = [seed] * n if isinstance(seed, int) else list(seed)
        if len(each) != n:
            raise ConfigError(f"{len(each)} seeds for {n} prompts.")
        seeds = torch.tensor(each, dtype=torch.int64)
    return (seeds[:, None] + torch.arange(copies) * 0x9E3779B1).flatten()


def _check_batch(options: dict[str, Any], names: Sequence[str]) -> None:
    if not names:
        raise AdapterError("no prompts: names= is empty.")
    for key in ("input_ids", "inputs", "inputs_embeds"):
        given = options.get(key)
        if isinstance(given, Tensor) and given.shape[0] != len(names):
            raise AdapterError(
                f"{key} holds {given.shape[0]} prompts, and {len(names)} adapters are named: name "
                "one for each, 'base' for none."
            )


def _option(options: dict[str, Any], config: Any, name: str, default: Any) -> Any:
    value = options[name] if options.get(name) is not None else getattr(config, name, None)
    return default if value is None else value
