"""What a pod's containers are given, resolved: environment, command, and the files of its volumes."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from tests.kubernetes.kubelet.api import Api, ApiError, Json

_VARIABLE = re.compile(r"\$\$|\$\(([\w.-]+)\)")


class NotYet(Exception):
    """Something that a pod names does not exist yet, or is of a kind that this kubelet does not know."""


class Resolver:
    """For one pod. Raises `NotYet`, and `ApiError` for objects that are not there."""

    def __init__(self, api: Api, pod: Json, address: str) -> None:
        self._api = api
        self._pod = pod
        self._address = address
        self._namespace = pod["metadata"]["namespace"]

    async def environment(self, container: Json) -> dict[str, str]:
        """In the order of the spec; a value may name those before it as $(NAME)."""
        found: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            kind = "configMapRef" if "configMapRef" in source else "secretRef"
            values = await self._content(kind.removesuffix("Ref"), source[kind])
            found |= {source.get("prefix", "") + name: value.decode() for name, value in values.items()}
        for entry in container.get("env", ()):
            if "valueFrom" in entry:
                value = await self._value(container, entry["valueFrom"])
                if value is None:
                    continue
            else:
                value = expand(entry.get("value", ""), found)
            found[entry["name"]] = value
        return found

    async def volumes(self, folder: Path) -> dict[str, Path]:
        """Makes each volume of the pod; where it is."""
        return {volume["name"]: await self._volume(volume, folder) for volume in self._pod["spec"].get("volumes", ())}

    async def _volume(self, volume: Json, folder: Path) -> Path:
        place = folder / str(volume["name"])
        if "hostPath" in volume:
            return Path(volume["hostPath"]["path"])
        place.mkdir(parents=True, exist_ok=True)
        if "emptyDir" in volume:
            return place
        for source in volume["projected"]["sources"] if "projected" in volume else (volume,):
            for path, content in (await self._files(source)).items():
                (place / path).parent.mkdir(parents=True, exist_ok=True)
                (place / path).write_bytes(content)
        return place

    async def _files(self, source: Json) -> dict[str, bytes]:
        """Those of one source, by path."""
        if "downwardAPI" in source:
            items = source["downwardAPI"]["items"]
            return {item["path"]: self._field(item["fieldRef"]["fieldPath"]).encode() for item in items}
        kind = next((kind for kind in ("configMap", "secret") if kind in source), None)
        if kind is None:
            raise NotYet(f"a volume of a kind that this kubelet does not know: {source}")
        content = await self._content(kind, source[kind])
        items = source[kind].get("items")
        return {item["path"]: content[item["key"]] for item in items} if items else content

    async def _value(self, container: Json, source: Json) -> str | None:
        """None: optional, and not there."""
        if "fieldRef" in source:
            return self._field(source["fieldRef"]["fieldPath"])
        if "resourceFieldRef" in source:
            kind, _, name = source["resourceFieldRef"]["resource"].partition(".")
            return str(container.get("resources", {}).get(kind, {}).get(name, ""))
        kind = "configMap" if "configMapKeyRef" in source else "secret"
        reference = source[f"{kind}KeyRef"]
        value = (await self._content(kind, reference)).get(reference["key"])
        if value is None and not reference.get("optional"):
            raise NotYet(f"{kind} {reference['name']} has no key {reference['key']}")
        return None if value is None else value.decode()

    async def _content(self, kind: str, reference: Json) -> dict[str, bytes]:
        """Of a ConfigMap or a Secret, by key."""
        name = reference.get("secretName") or reference["name"]
        try:
            found = await self._api.get(f"/api/v1/namespaces/{self._namespace}/{kind.lower()}s/{name}")
        except ApiError as error:
            if error.status == 404 and reference.get("optional"):
                return {}
            raise
        content = (found.get("data") or {}).items()
        return {key: base64.b64decode(value) if kind == "secret" else value.encode() for key, value in content}

    def _field(self, path: str) -> str:
        """Of the downward API."""
        if path in ("status.podIP", "status.hostIP"):
            return self._address
        keyed = re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path)
        if keyed:
            return str(self._pod["metadata"].get(keyed[1], {}).get(keyed[2], ""))
        value: object = self._pod
        for part in path.split("."):
            value = value.get(part, "") if isinstance(value, dict) else ""
        return str(value)


def expand(text: str, environment: dict[str, str]) -> str:
    """With each $(NAME) replaced by that variable, if there is one; $$ is a $."""

    def value(match: re.Match[str]) -> str:
        return "$" if match[1] is None else environment.get(match[1], match[0])

    return _VARIABLE.sub(value, text)
