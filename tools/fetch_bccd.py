"""Download BCCD: 364 microscope photographs of blood cells with boxes, in Pascal VOC format.

BCCD is public on GitHub as Shenggan/BCCD_Dataset, under the MIT license. The archive has 8 MB.
"""

import argparse
import hashlib
import shutil
import zipfile
from pathlib import Path

from mmevm.download import download

COMMIT = 'd272fb14cdff6e473fafeeeba32aba5f560e9e43'
URL = f'https://github.com/Shenggan/BCCD_Dataset/archive/{COMMIT}.zip'
# Of the files' names and contents. GitHub creates archives on request and does not guarantee their bytes.
SHA256 = '5f5a6b00066a74ecbf6e2fd6b98dea243f9b517fc6ca2a5c84e23c1b0fd39a5e'
FOLDERS = ('Annotations', 'ImageSets', 'JPEGImages')


def read_files(archive: Path) -> dict[str, bytes]:
    """Return the content of the license and of all files of the dataset, by their names within its folder."""
    files = {}
    with zipfile.ZipFile(archive) as content:
        for name in content.namelist():
            inner = name.partition('/')[2].removeprefix('BCCD/')  # the first folder is that of the archive
            if not name.endswith('/') and (inner == 'LICENSE' or inner.startswith(FOLDERS)):
                files[inner] = content.read(name)
    return files


def checksum(files: dict[str, bytes]) -> str:
    """Return the SHA-256 of the sorted names and contents."""
    total = hashlib.sha256()
    for name, content in sorted(files.items()):
        total.update(f'{name} {hashlib.sha256(content).hexdigest()}\n'.encode())
    return total.hexdigest()


def fetch(root: Path, url: str) -> None:
    """Download and verify the archive, and write its files to a folder."""
    archive = root.with_name(f'{root.name}.zip')
    try:
        download(url, archive)
    except OSError as error:
        raise SystemExit(
            f'{url}: download failed ({error}). Try again, or run `make demo-photos DATA=DIR` with a folder '
            f'that contains {", ".join(FOLDERS)} of BCCD.'
        ) from error
    try:
        files = read_files(archive)
    except zipfile.BadZipFile:
        files = {}
    if checksum(files) != SHA256:
        archive.unlink()
        raise SystemExit(
            f'{url}: the archive does not contain the files of commit {COMMIT[:7]} (wrong checksum), and was removed. '
            'Try again, or download BCCD by other means and run `make demo-photos DATA=DIR` with its folder.'
        )
    incomplete = root.with_name(f'{root.name}.incomplete')  # a folder of the final name is complete
    shutil.rmtree(incomplete, ignore_errors=True)
    for name, content in files.items():
        path = incomplete / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    incomplete.rename(root)
    archive.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', type=Path, help='output folder; nothing is downloaded if it exists')
    parser.add_argument('--url', default=URL, help='the same archive on another server (default: GitHub)')
    args = parser.parse_args()
    if not args.root.exists():
        fetch(args.root, args.url)
    missing = [folder for folder in FOLDERS if not (args.root / folder).is_dir()]
    if missing:
        raise SystemExit(f'{args.root}: exists, but has no {missing[0]}. Remove it, or give another folder.')
    print(f'{args.root}: {len(list((args.root / "JPEGImages").iterdir()))} photographs')


if __name__ == '__main__':
    main()
