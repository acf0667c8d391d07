"""`awq generate`: continue a prompt, shown while it is made."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from awq_core.cli.options import device_option, json_option, plugin_option, trust_option
from awq_core.cli.output import duration, note, plural, print_json


@click.command(
    epilog="""\b
Examples:
  awq generate DIR --prompt "def read_json(path):"
  awq generate DIR --prompt "Name three rivers." --max-new-tokens 64 --temperature 0.7
  awq generate DIR --prompt "What is in the picture?" --image photo.jpg
  awq generate DIR --prompt "Name three rivers." --fuse
\b
Where the tokenizer has a chat template the prompt is a message of the user;
--raw switches that off. Text is on stdout, the speed on stderr.
"""
)
@click.argument("model", metavar="DIR")
@click.option("--prompt", required=True, help="Text to continue or to answer.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), metavar="N", default=128, help="Stop after so many.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, help="0 takes the likeliest token.")
@click.option("--seed", type=int, default=0, help="For temperatures above 0.")
@click.option("--raw", is_flag=True, help="No chat template.")
@click.option("--image", type=click.Path(exists=True, dir_okay=False), help="A picture, for vision-language models.")
@click.option("--fuse", is_flag=True, help="Merge linears and replace what the model's plugin declares: faster.")
@device_option
@plugin_option
@trust_option
@json_option
def generate(
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    raw: bool,
    image: str | None,
    fuse: bool,
    device: str,
    plugin: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Continue a prompt with the model in DIR, quantized or not."""
    from awq_core.cli import models

    if image is None:
        opened: Any = models.open_tokenizer(model, trust_remote_code=trust_remote_code)
        tokenizer = opened
    else:
        opened = models.open_processor(model, trust_remote_code=trust_remote_code)
        tokenizer = opened.tokenizer
    network = models.open_model(model, device=device, plugin=plugin, trust_remote_code=trust_remote_code, fuse=fuse)
    chat = not raw and bool(getattr(opened, "chat_template", None))
    inputs = image_inputs(opened, prompt, image, chat) if image else text_inputs(opened, prompt, chat)
    prompt_tokens = inputs["input_ids"].shape[1]
    if not prompt_tokens:
        raise click.BadParameter("the prompt is empty", param_hint="--prompt")
    import torch
    from transformers import TextStreamer

    torch.manual_seed(seed)
    shown = None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    watch = Stopwatch(shown)
    with torch.no_grad():
        output = network.generate(
            **inputs.to(network.device),
            **sampling(network, tokenizer, temperature),
            max_new_tokens=max_new_tokens,
            streamer=watch,
        )
    made = output[0, prompt_tokens:]
    if as_json:
        print_json(
            {
                "model": model,
                "prompt": prompt,
                "chat_template": chat,
                "text": tokenizer.decode(made, skip_special_tokens=True),
                "prompt_tokens": prompt_tokens,
                "new_tokens": len(made),
                "seconds_to_first_token": watch.first,
                "tokens_per_second": watch.speed,
                "device": str(network.device),
            }
        )
        return
    rate = f", {watch.speed:.1f} tokens per second" if watch.speed else ""
    note(f"{plural(len(made), 'token')}{rate}, first after {duration(watch.first)}, on {network.device}")


class Stopwatch:
    """Passes tokens on to a streamer and takes the time: of the first token, and of those after it."""

    def __init__(self, streamer: Any = None) -> None:
        self.streamer = streamer
        self.times: list[float] = []
        self.tokens = 0

    def put(self, value: Any) -> None:
        if self.times:
            self.tokens += value.numel()
        self.times.append(time.perf_counter())  # the first time is that of the prompt
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()

    @property
    def first(self) -> float:
        """Seconds from the prompt to the first token."""
        return self.times[1] - self.times[0] if len(self.times) > 1 else 0.0

    @property
    def speed(self) -> float | None:
        """Tokens per second after the first; None where there are no two."""
        if len(self.times) < 3 or self.times[-1] == self.times[1]:
            return None
        return (self.tokens - 1) / (self.times[-1] - self.times[1])


def text_inputs(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """Token ids of a prompt, as a user's message where `chat`."""
    if not chat:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")


def image_inputs(processor: Any, prompt: str, image: str, chat: bool) -> Any:
    """Token ids and pixels of a prompt about one picture. Without a template the picture comes first."""
    from awq_core.calibration.formats import open_image

    picture = open_image(Path(image))
    if not chat:
        token = getattr(processor, "image_token", "")
        text = prompt if not token or token in prompt else f"{token}\n{prompt}"
        return processor(text=text, images=picture, return_tensors="pt")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def sampling(model: Any, tokenizer: Any, temperature: float) -> dict[str, Any]:
    """Arguments of `generate` that choose tokens; at temperature 0 the model's own sampling settings are put aside."""
    pad = model.generation_config.pad_token_id
    if pad is None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if temperature:
        return {"do_sample": True, "temperature": temperature, "pad_token_id": pad}
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": pad}
