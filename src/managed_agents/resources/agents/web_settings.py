"""Settings of the web tools: what may be asked for, and how it is stored and shown. Pure.

Messages follow the hosted API's where those are known (observed hosted behaviour).
"""

import re
import zoneinfo
from collections.abc import Collection, Sequence
from functools import cache
from ipaddress import ip_address
from typing import Any

from publicsuffixlist import PublicSuffixList

from managed_agents.core.errors import InvalidRequest
from managed_agents.resources.agents.schemas import UrlSourceTools, UrlSourceType, WebFetchConfig, WebSearchConfig

Json = dict[str, Any]

DOMAINS_MAX = 64
DOMAIN_CHARS_MAX = 255
SERVER_TOOLS = frozenset({"web_search", "web_fetch"})
_LOCAL = ("localhost", "local", "internal", "localdomain", "invalid")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"(0x[0-9a-f]*|[0-9]+)")
_PATH = re.compile(r"[^\s?#$,|^!]*")
# ISO 3166-1 alpha-2, side by side.
_COUNTRIES = (
    "ADAEAFAGAIALAMAOAQARASATAUAWAXAZBABBBDBEBFBGBHBIBJBLBMBNBOBQBRBSBTBVBWBYBZCACCCDCFCGCHCICKCLCMCNCOCRCUCVCWCXCYCZDEDJDKDM"
    "DODZECEEEGEHERESETFIFJFKFMFOFRGAGBGDGEGFGGGHGIGLGMGNGPGQGRGSGTGUGWGYHKHMHNHRHTHUIDIEILIMINIOIQIRISITJEJMJOJPKEKGKHKIKMKN"
    "KPKRKWKYKZLALBLCLILKLRLSLTLULVLYMAMCMDMEMFMGMHMKMLMMMNMOMPMQMRMSMTMUMVMWMXMYMZNANCNENFNGNINLNONPNRNUNZOMPAPEPFPGPHPKPLPM"
    "PNPRPSPTPWPYQARERORSRURWSASBSCSDSESGSHSISJSKSLSMSNSOSRSSSTSVSXSYSZTCTDTFTGTHTJTKTLTMTNTOTRTTTVTWTZUAUGUMUSUYUZVAVCVEVGVI"
    "VNVUWFWSYEYTZAZMZW"
)


@cache
def _suffixes() -> PublicSuffixList:
    return PublicSuffixList()


def resolve(config: WebFetchConfig | WebSearchConfig, custom_tools: Collection[str], path: str) -> Json:
    """The settings of one entry as stored: every key present, null where it was not set.

    Raises InvalidRequest naming the setting.
    """
    if config.allowed_domains is not None and config.blocked_domains is not None:
        raise InvalidRequest(f"{path}: Only one of allowed_domains or blocked_domains may be set.")
    settings: Json = {}
    for name in ("allowed_domains", "blocked_domains"):
        domains: list[str] | None = getattr(config, name)
        if domains is not None:
            _check_domains(domains, f"{path}.{name}", name, with_path=isinstance(config, WebSearchConfig))
        settings[name] = domains
    if isinstance(config, WebSearchConfig):
        location = config.user_location
        if location is not None:
            if location.country is not None and not _is_country(location.country):
                raise InvalidRequest(f"{path}.user_location.country: not a country the search provider supports")
            if location.timezone is not None and location.timezone not in zoneinfo.available_timezones():
                raise InvalidRequest(f"{path}.user_location.timezone: not an IANA time zone")
        settings["user_location"] = None if location is None else location.model_dump()
        return settings
    settings["max_content_tokens"] = config.max_content_tokens
    settings["url_sources"] = _url_sources(config, custom_tools, f"{path}.url_sources")
    return settings


def _check_domains(domains: Sequence[str], path: str, name: str, *, with_path: bool) -> None:
    if not domains:
        raise InvalidRequest(f"{path}: {name}: Empty list of domains is ambiguous. Provide at least one domain or null.")
    if len(domains) > DOMAINS_MAX:
        raise InvalidRequest(f"{path}: at most {DOMAINS_MAX} domains are allowed")
    seen: set[str] = set()
    for index, domain in enumerate(domains):
        if (wrong := _wrong(domain, with_path=with_path)) is not None:
            raise InvalidRequest(f"{path}.{index}: {name}.{index}: {wrong}")
        if (plain := domain.lower().removesuffix("/")) in seen:
            raise InvalidRequest(f'{path}.{index}: duplicate domain "{domain}"')
        seen.add(plain)


def _wrong(domain: str, *, with_path: bool) -> str | None:
    """What is wrong with one entry, if anything."""
    if not 1 <= len(domain) <= DOMAIN_CHARS_MAX:
        return f"a domain has 1 to {DOMAIN_CHARS_MAX} characters"
    if not domain.isascii():
        return "only ASCII is supported; write international names in their xn-- form"
    host, slash, rest = domain.lower().removesuffix("/").partition("/")
    if slash and not with_path:
        return "paths are not supported; provide a plain hostname"
    if not _PATH.fullmatch(rest):
        return "the path contains characters that are not supported"
    if _is_address(host):
        return 'IP addresses are not supported; provide a plain hostname like "example.com"'
    labels = host.split(".")
    if not all(_LABEL.fullmatch(label) for label in labels):
        return 'provide a plain hostname like "example.com", without scheme, port, credentials, wildcards or spaces'
    if labels[-1] in _LOCAL:
        return "local names are not supported"
    if len(labels) < 2 or _suffixes().is_public(host):
        return "a whole registry suffix is not supported; provide a domain below it"
    return None


def _is_address(host: str) -> bool:
    """In any notation that some resolver would take for one."""
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return _NUMBER.fullmatch(host.rpartition(".")[2]) is not None
    return True


def _is_country(code: str) -> bool:
    return len(code) == 2 and code in (_COUNTRIES[at : at + 2] for at in range(0, len(_COUNTRIES), 2))


def _url_sources(config: WebFetchConfig, custom_tools: Collection[str], path: str) -> Json | None:
    given = config.url_sources
    if given is None:
        return None
    sources: Json = {"user_input": _source(given.user_input)}
    for name, known in (("client_tool_results", custom_tools), ("server_tool_results", SERVER_TOOLS)):
        wanted: str | UrlSourceType | UrlSourceTools | None = getattr(given, name)
        sources[name] = _source(wanted)
        if isinstance(wanted, UrlSourceTools):
            names = [tool.name for tool in wanted.tools]
            if len(set(names)) != len(names):
                raise InvalidRequest(f"{path}.{name}.tools: each tool may be named once")
            for index, tool in enumerate(names):
                if tool not in known:
                    raise InvalidRequest(f'{path}.{name}.tools.{index}.name: no such tool "{tool[:100]}" in tools')
    if all(source is not None and source["type"] == "none" for source in sources.values()):
        raise InvalidRequest(f"{path}: at least one source must allow URLs")
    return sources


def _source(given: str | UrlSourceType | UrlSourceTools | None) -> Json | None:
    if given is None or not isinstance(given, str):
        return None if given is None else given.model_dump()
    return {"type": given}
