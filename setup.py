import shutil
from pathlib import Path

from setuptools import find_packages, setup
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


DEMO = ['matplotlib', 'scikit-learn']
DATA = ['supervision>=0.31']  # converts annotations in YOLO and other formats
EXPORT = ['onnx', 'onnxscript', 'onnxruntime', 'openvino']

setup(
    name='mmevm',
    version=version['__version__'],
    description='EfficientViM (CVPR 2025) as a multi-scale backbone for MMDetection, MMPretrain and MMSegmentation',
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    # With package_dir, an editable install adds a path. Without it, setuptools installs an import hook, and in the
    # parent folder of a clone named mmevm, Python would import the clone as an empty namespace package.
    package_dir={'': '.'},
    packages=find_packages(include=['mmevm', 'mmevm.*']),
    cmdclass={'build_py': BuildWithConfigs},
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
        'data': DATA,
        # MMSegmentation, in addition to one of the two
        'seg-onedl': ['onedl-mmsegmentation>=1.4.2'],
        'seg-openmmlab': ['mmsegmentation>=1.2.2', 'ftfy', 'regex'],  # it imports both, but declares neither
        'demo': DEMO,
        'export': EXPORT,
        'docs': ['furo', 'myst-parser', 'sphinx', 'sphinx-copybutton'],
        'dev': [
            *DATA,
            *DEMO,
            *EXPORT,
            'hypothesis',
            'ipykernel',
            'mypy',
            'nbclient',
            'pip-audit',
            'psutil',
            'pytest',
            'pytest-cov',
            'pytest-timeout',
            'pytest-xdist',
            'ruff',
            'setuptools>=64',
            'tensorboard',
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
