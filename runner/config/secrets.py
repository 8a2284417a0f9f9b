"""Finds secrets that are written out in a configuration. The rules, all of them:

* **By the value**: a password in a URL, a signature or token in its query, a header such as ``Authorization: ...``, a
  private key, or the form of a well-known service's token is a secret under any key.
* **By the key**: under ``password``, ``secret``, ``credentials``, ``authorization``, ``api_key``, ``access_token`` and
  the like (``_STRONG``) every text is a secret, unless the key's last word only describes one (``secret_name``).
* ``token``, ``key``, ``auth`` and the like mean other things in language models (``_WEAK``). There a text is a secret
  if it looks random; under ``token`` alone, or ``session_key`` and the like, also if it has 8 characters and is not
  made of small words (``word_piece``); in options of a store, in headers and in an environment always.
* A value below ``secrets``, ``tokens`` or ``keys``, and a ``value`` below any key, counts as under that key itself.
* Never: numbers (but for those of a password), booleans, paths, addresses, special tokens (``<pad>``), interpolations.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from runner.errors import has_credentials, redacted

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")  # of snake_case, Kebab-Case, camelCase
_PASSWORD = re.compile(r"(^|_)(password|passwd|pwd|passphrase|passcode)s?(_|$)")
_STRONG = re.compile(
    rf"{_PASSWORD.pattern}|(^|_)(secret|credential|cred|authorization|bearer|cookie|api_?key|connection_?string"
    r"|(access|account|api|auth|bot|deploy|github|gitlab|hf|hub|oauth|private|refresh|secret|security|signing|slack"
    r"|ssh|wandb)(_access)?_?(key|token|sas|signature)|(app|client|master|service|session|shared|storage)(_access_?key"
    r"|_?(token|sas|signature))|(admin|db|ftp|http|login|proxy|root|smtp|sql|user)_pass)s?(_|$)"
)
_WEAK = re.compile(r"(^|_)(token|key|auth|sas|sig|signature|jwt|pat|pass|pw)s?$")
_TOKEN = re.compile(r"token$|([a-z_]+_)?(app|client|master|service|session|shared|storage)_?keys?$")
_PLAIN = re.compile(r"(?!.*(secret|passw))[a-z]+([_-][a-z]+)*")
_SHARED = re.compile(r"(^|_)(password|passwd|secret|token|key|cookie)s$")  # by all that is below such a key
_ABOUT = re.compile(
    r"_(column|dim|dir|env|field|file|folder|format|kind|length|mode|name|path|policy|size|type|uri|url|var)s?$"
)
_STRICT = re.compile(r"(^|_)(storage_options|client_kwargs|headers|env_set|environ|auth)$")
_SHAPE = re.compile(
    r"(?i)-----BEGIN [A-Z ]*PRIVATE KEY|\b(ghp|gho|ghs|ghu|glpat|github_pat|xox[abprs])[-_][A-Za-z0-9_-]{16,}"
    r"|\b(hf_|npm_|sk-)(?=[\w-]*[a-z0-9]{16})[\w-]{20,}|\b(AIza|ya29\.)[\w-]{20,}|hooks\.slack\.com/services/[^$]"
    r"|\b(AKIA|ASIA)[A-Z0-9]{16}\b|\beyJ[\w-]{8,}\.[\w-]{8,}\.|^Bearer +[^\s$]{8,}$"
    r"|^(proxy-)?authorization\s*:\s*(?!\S*\s*\$)((basic|bearer|digest|token)\s|\S+(\s+\S+)?$)"
    r"|\bauthorization\s*:\s*(basic|bearer|token)\s+(?=\S*\d)[^\s$]{6,}|^(cookie|[\w-]*(api-?key|-token))\s*:\s*(?!\$)\S{4,}"
)
_HARMLESS = re.compile(
    r"(?is)|\?\?\?|none|null|true|false|auto|default|anon|[-+.\d_e]+|<.*>|\[.*\]|\{.*\}|\|.*\||[^\w]+"
    r"|(~|\.{0,2}/|[A-Za-z]:[\\/]|[A-Za-z][\w+.-]*://).*|\S*\.(json|ya?ml|toml|pem|crt|key|txt|cfg|ini|bin|model)"
)
_DEFAULT = re.compile(r"\$\{oc\.env:[^,{}]+,([^{}]*)\}")
_PRIVATE_KEY = re.compile(r"(?s)(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(-----END|\Z)")
# A name, quoted or not, with a type or not, and its value: in Python, YAML, JSON, shell.
_ASSIGNED = re.compile(
    r"""(?<![\w.])(?P<name>[A-Za-z_][\w.-]{0,80})(?P<is>["']?\s*(?::\s*[\w.|\[\] ]+=(?!=)|=(?!=)|:)\s*)"""
    r"""(?P<value>"[^"\n]*"|'[^'\n]*'|[^\s"',;(){}\[\]]+)"""
)
_RANDOM = re.compile(r"(?=[a-z+=]*([0-9]+[a-z+=]+){3}|([a-z+=]+[0-9]+){3})[a-z0-9+=]{16,}", re.IGNORECASE)


class Unresolved(str):
    """The interpolation of a value that comes from the environment, in place of the value, which is in ``value``."""

    value: Any

    def __new__(cls, text: str, value: Any) -> "Unresolved":
        self = super().__new__(cls, text)
        self.value = value
        return self


def find_secrets(value: Any, path: str, name: str = "", *, strict: bool = False, nested: bool = False) -> Iterator[str]:
    """The keys from ``path`` down whose values are secrets and no interpolations. ``value`` is plain and unresolved."""
    name = name or path.rpartition(".")[2]  # the key that counts
    if isinstance(value, Mapping):
        strict = strict or bool(_STRICT.search(_words(name)))
        for key, inner in value.items():
            own = str(key).rpartition(".")[2]
            if own == "value" or (_SHARED.search(_words(name)) and not own.startswith("_")):
                own = name
            yield from find_secrets(inner, f"{path}.{key}", own, strict=strict)
    elif isinstance(value, list | tuple):
        names = _names(value, name, paired=strict or nested)
        for place, (inner, each) in enumerate(zip(value, names, strict=True)):
            yield from find_secrets(inner, f"{path}[{place}]", each, strict=strict, nested=True)
    elif _is_secret(value, _words(name), strict=strict):
        yield path


def names_a_secret(key: str) -> bool:
    """Whether a key, or a variable, of this name holds a secret, whatever its value looks like."""
    name = _words(key.rpartition(".")[2])
    return (bool(_STRONG.search(name)) and not _ABOUT.search(name)) or bool(_TOKEN.match(name))


def hide_secrets(text: str) -> str:
    """A text of any kind, such as code, with *** in place of secrets: by their form, or by the name they are given."""

    def hidden(match: re.Match[str]) -> str:
        value = match["value"].strip("\"'")
        secret = value and _is_secret(value, _words(match["name"].rpartition(".")[2]), strict=False)
        return match[0].replace(match["value"], match["value"].replace(value, "***")) if secret else match[0]

    lines = redacted(_PRIVATE_KEY.sub(r"\1 *** \2", text)).split("\n")
    return "\n".join(_SHAPE.sub("***", _ASSIGNED.sub(hidden, line)) for line in lines)


def may_be_secret(value: str) -> bool:
    """Whether a text, under any key, looks more like a secret than like a word, a number, a path or an address."""
    word_with_digit = value.split() == [value] and re.search(r"\d", value) is not None
    return word_with_digit and len(value) >= 6 and not _HARMLESS.fullmatch(value)


def _names(values: "list[Any] | tuple[Any, ...]", name: str, *, paired: bool) -> list[str]:
    """The name of each value: that of the list, the option before it (``--password``), or the first of a pair."""
    names = [name] * len(values)
    if len(values) == 2 and isinstance(values[0], str):
        if re.search("(^|_)auth$", _words(name)):
            names[1] = "password"
        elif paired:
            names[1] = values[0]
    for place, before in enumerate(values[:-1], 1):
        if isinstance(before, str) and before.startswith("-"):
            names[place] = before
    return names


def _is_secret(value: Any, name: str, *, strict: bool) -> bool:
    if isinstance(value, str) and (option := re.fullmatch(r"--?(\w[\w.-]*)=(.+)", value)):
        name, value = _words(option[1]), option[2]
    strong = bool(_STRONG.search(name)) and not _ABOUT.search(name)
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return strong and abs(value) >= 1000 and (strict or bool(_PASSWORD.search(name)))
    if not isinstance(value, str):
        return False
    if has_credentials(value) or _SHAPE.search(value):
        return True
    default = _DEFAULT.search(value)
    text = default[1].strip("'\" ") if default else value
    if "${" in text or _HARMLESS.fullmatch(text):
        return False
    if strong or not _WEAK.search(name):
        return strong
    if strict or (_TOKEN.match(name) and len(text) >= 8 and text.split() == [text] and not _PLAIN.fullmatch(text)):
        return True
    return bool(_RANDOM.search(text)) or (name in ("auth", "pass", "pw", "jwt", "sas", "pat") and may_be_secret(text))


def _words(name: str) -> str:
    return "_".join(_WORD.findall(name)).lower()
