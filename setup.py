import shutil
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
version = {}
exec((here / 'mmevm' / 'version.py').read_text(), version)


class BuildWithConfigs(build_py):
    """Copy configs and tools to mmevm/.mim, as other OpenMMLab packages do. An editable install uses the repository."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        mim = Path(self.build_lib, 'mmevm', '.mim')
        shutil.rmtree(mim, ignore_errors=True)  # files of an earlier build may have been renamed since
        for folder in ('configs', 'tools'):
            shutil.copytree(here / folder, mim / folder, ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(here / 'model-index.yml', mim)


class InstallStartupFile(Command):
    """Put mmevm.pth into site-packages (see mmevm_startup.py).

    It replaces the command install_headers, which setuptools runs for wheels and for editable installs. Both have a
    folder NAME.data, of which pip copies the subfolder purelib to site-packages.
    """

    user_options = []

    def initialize_options(self):
        self.install_dir = None

    def finalize_options(self):
        self.set_undefined_options('install', ('install_headers', 'install_dir'))

    def run(self):
        purelib = Path(self.install_dir).parent / 'purelib'
        purelib.mkdir(parents=True, exist_ok=True)
        (purelib / 'mmevm.pth').write_text('import mmevm_startup\n')

    def get_outputs(self):
        return []


setup(
    name='mmevm',
    version=version['__version__'],
    description='EfficientViM (CVPR 2025) as a multi-scale backbone for MMDetection and MMPretrain',
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    # Makes an editable install add a path. Otherwise setuptools adds an import hook, and from the parent of a clone
    # named mmevm, Python imports the clone's folder as an empty namespace package instead.
    package_dir={'': '.'},
    packages=find_packages(include=['mmevm', 'mmevm.*']),
    py_modules=['mmevm_startup'],
    headers=['mmevm.pth'],  # makes setuptools run install_headers
    cmdclass={'build_py': BuildWithConfigs, 'install_headers': InstallStartupFile},
    install_requires=[
        'torch>=2.1',
        'torchvision>=0.16',
        'timm>=1.0.31',
        'huggingface_hub',
        'safetensors',
        'pycocotools>=2.0.7',
        'rich',
    ],
    # The two distributions of OpenMMLab packages have the same import names, so mmevm requires neither: pip would
    # install one over the other.
    extras_require={
        'onedl': [
            'torch>=2.3',  # onedl-mmengine 0.10.12 imports torch.amp.GradScaler
            'torchvision>=0.18',
            'onedl-mmengine>=0.10.12',
            'onedl-mmcv>=2.3.6',
            'onedl-mmdetection>=3.5.1',
            'onedl-mmpretrain>=1.3.6',
        ],
        'openmmlab': [
            'mmengine>=0.10.7',
            'mmcv-lite>=2.1.0,<2.2.0',
            'mmdet>=3.3.0',
            'mmpretrain>=1.2.0',
            'setuptools<81',  # mmengine 0.10 imports pkg_resources
        ],
        'export': ['onnx', 'onnxscript', 'onnxruntime', 'openvino'],
        'dev': [
            'hypothesis',
            'matplotlib',
            'mypy',
            'onnx',
            'onnxruntime',
            'onnxscript',
            'openvino',
            'pip-audit',
            'psutil',
            'pytest',
            'pytest-cov',
            'pytest-timeout',
            'pytest-xdist',
            'ruff',
            'scikit-learn',
            'setuptools>=64',
            'tensorboard',
            'tqdm',
        ],
    },
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
    ],
)
