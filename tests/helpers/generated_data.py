"""Generate a few images and annotations in the format of each dataset in the stock configs."""

import copy
import itertools
import json
import pickle
from pathlib import Path

import cv2
import numpy as np
from mmengine.registry import DATASETS

SIDE = 64
BOX = dict(bbox=[5, 5, 20, 20], area=400, iscrowd=0, segmentation=[[5, 5, 25, 5, 25, 25, 5, 25]])


class Generator:
    """Write the files of datasets and point configs to them.

    Args:
        root: Folder of the files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.numbers = itertools.count()
        for folder in ('', 'img1', 'frames', '0'):
            (root / 'images' / folder).mkdir(parents=True, exist_ok=True)
            for name in ('a', 'b', '000001', '000002'):
                cv2.imwrite(str(root / 'images' / folder / f'{name}.jpg'), np.full((SIDE, SIDE, 3), 127, np.uint8))

    def localize(self, cfg: dict) -> dict | None:
        """Return the config with generated files; None for an unknown format."""
        cfg = copy.deepcopy(cfg)
        with DATASETS.switch_scope_and_registry(None) as registry:
            kind = cfg['type'] if isinstance(cfg['type'], type) else registry.get(cfg['type'])
        names = [base.__name__ for base in kind.__mro__]
        make = next((getattr(self, f'make_{name}') for name in names if hasattr(self, f'make_{name}')), None)
        if make is None:
            return None
        cfg['data_root'] = ''
        for name in ('backend_args', 'indices', 'proposal_file'):  # generated files are local, without proposals
            cfg.pop(name, None)
        try:  # some datasets set their classes in code
            classes = DATASETS.build(dict(cfg, lazy_init=True, pipeline=[], ann_file='')).metainfo.get('classes')
        except (TypeError, OSError):
            classes = None
        make(cfg, list(classes or ['thing']))
        return cfg

    def write(self, name: str, content: dict | list | str) -> str:
        path = self.root / name
        if name.endswith('.json') and path.exists():  # of another dataset
            path = path.with_stem(f'{path.stem}_{next(self.numbers)}')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    def coco(self, classes: list[str], **image) -> dict:
        images = [dict(id=i, file_name=f'{name}.jpg', width=SIDE, height=SIDE, **image) for i, name in enumerate('ab')]
        annotations = [dict(BOX, id=i, image_id=i, category_id=1) for i in range(2)]
        annotations.append(dict(BOX, id=2, image_id=0, category_id=1, iscrowd=1))
        categories = [dict(id=i, name=name, isthing=1, supercategory='x') for i, name in enumerate(classes, 1)]
        return dict(images=images, annotations=annotations, categories=categories, info={}, licenses=[])

    def prefix(self, cfg: dict, folder: str = '') -> None:
        cfg['data_prefix'] = {
            name: str(self.root / 'images' / folder) for name in cfg.get('data_prefix') or {'img': ''}
        }

    def make_CocoDataset(self, cfg, classes):
        cfg['ann_file'] = self.write('coco.json', self.coco(classes))
        self.prefix(cfg)

    def make_LVISV05Dataset(self, cfg, classes):
        coco = self.coco(classes, coco_url='http://images/a.jpg', neg_category_ids=[], not_exhaustive_category_ids=[])
        cfg['ann_file'] = self.write(f'lvis_{len(classes)}.json', coco)
        cfg['data_prefix'] = dict(img=str(self.root / 'images'))

    def make_LVISV1Dataset(self, cfg, classes):
        self.make_LVISV05Dataset(cfg, classes)
        coco = json.loads(Path(cfg['ann_file']).read_text())
        for image in coco['images']:
            image['coco_url'] = f'http://images.cocodataset.org/{image["file_name"]}'
        cfg['ann_file'] = self.write(f'lvis1_{len(classes)}.json', coco)

    def make_MDETRStyleRefCocoDataset(self, cfg, classes):
        cfg['ann_file'] = self.write('refcoco.json', self.coco(classes, caption='a thing', dataset_name='refcoco'))
        self.prefix(cfg)

    def make_Flickr30kDataset(self, cfg, classes):
        coco = self.coco(classes, caption='a thing', tokens_positive_eval=[[[2, 7]]])
        for annotation in coco['annotations']:
            annotation['phrase_ids'] = [0]
        cfg['ann_file'] = self.write('flickr.json', coco)
        self.prefix(cfg)

    def make_OpenImagesDataset(self, cfg, classes):
        cfg['label_file'] = self.write('labels.csv', '/m/1,thing\n/m/2,other')
        cfg['hierarchy_file'] = self.write(
            'hierarchy.json', dict(LabelName='/m/0', Subcategory=[dict(LabelName='/m/1'), dict(LabelName='/m/2')])
        )
        header = (
            'ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,I'
        )
        rows = [f'{name},x,/m/1,1,0.1,0.5,0.1,0.5,0,0,0,0,0' for name in 'ab']
        cfg['ann_file'] = self.write('boxes.csv', '\n'.join([header, *rows]))
        metas = [dict(filename=f'{name}.jpg', ori_shape=(SIDE, SIDE, 3)) for name in 'ab']
        cfg['meta_file'] = str(self.root / 'metas.pkl')
        Path(cfg['meta_file']).write_bytes(pickle.dumps(metas))
        cfg['image_level_ann_file'] = None
        self.prefix(cfg)

    def make_V3DetDataset(self, cfg, classes):
        names = [f'class {i}' for i in range(13204)]
        cfg['label_file'] = self.write('v3det.txt', '\n'.join(names))
        cfg.pop('metainfo', None)
        self.make_CocoDataset(cfg, names)

    def make_CocoPanopticDataset(self, cfg, classes):
        coco = self.coco(classes)
        segments = [dict(BOX, id=i, category_id=1) for i in range(1)]
        names = ['a.png', 'b.png']
        coco['annotations'] = [dict(image_id=i, file_name=name, segments_info=segments) for i, name in enumerate(names)]
        for name in names:
            cv2.imwrite(str(self.root / 'images' / name), np.zeros((SIDE, SIDE, 3), np.uint8))
        cfg['ann_file'] = self.write('panoptic.json', coco)
        self.prefix(cfg)

    def make_BaseVideoDataset(self, cfg, classes):
        coco = self.coco(classes)
        coco['videos'] = [dict(id=1, name='video')]
        for i, image in enumerate(coco['images']):
            image.update(video_id=1, frame_id=i, file_name=f'img1/00000{i + 1}.jpg')
        for annotation in coco['annotations']:
            annotation.update(video_id=1, instance_id=annotation['id'], mot_conf=1.0, visibility=1.0)
        cfg['ann_file'] = self.write(f'video_{len(classes)}.json', coco)
        self.prefix(cfg)

    def make_XMLDataset(self, cfg, classes):
        box = ''.join(f'<{side}>{value}</{side}>' for side, value in dict(xmin=5, ymin=5, xmax=40, ymax=40).items())
        size = f'<size><width>{SIDE}</width><height>{SIDE}</height></size>'
        found = f'<object><name>{classes[0]}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>'
        folders = ('VOC2007', 'VOC2012', 'WIDER')
        for folder in folders:
            for name in 'ab':
                xml = f'<annotation><folder>0</folder><filename>{name}.jpg</filename>{size}{found}</annotation>'
                self.write(f'{folder}/Annotations/{name}.xml', xml)
                for images in ('JPEGImages', '0'):
                    (self.root / folder / images).mkdir(exist_ok=True)
                    (self.root / folder / images / f'{name}.jpg').write_bytes((self.root / 'images/a.jpg').read_bytes())
        cfg['ann_file'] = self.write('sets.txt', 'a\nb')
        old = str((cfg.get('data_prefix') or {}).get('sub_data_root', ''))
        folder = next((name for name in folders if name in old), 'WIDER')
        cfg['data_prefix'] = dict(sub_data_root=f'{self.root / folder}/')

    def make_CrowdHumanDataset(self, cfg, classes):
        line = {'ID': 'a', 'gtboxes': [dict(tag='person', fbox=[5, 5, 20, 20], extra={})]}
        cfg['ann_file'] = self.write('annotation_train.odgt', '\n'.join(json.dumps({**line, 'ID': i}) for i in 'ab'))
        self.write('id_hw_train.json', {name: [SIDE, SIDE] for name in 'ab'})
        cfg['data_root'] = f'{self.root}/'
        self.prefix(cfg)

    def make_ODVGDataset(self, cfg, classes):
        image = dict(filename='a.jpg', height=SIDE, width=SIDE)
        detection = dict(detection=dict(instances=[dict(bbox=[5, 5, 25, 25], label=0, category='thing')]))
        grounding = dict(
            grounding=dict(
                caption='a thing', regions=[dict(bbox=[[5, 5, 25, 25]], phrase='thing', tokens_positive=[[2, 7]])]
            )
        )
        by_labels = cfg.get('label_map_file')
        if by_labels:
            cfg['label_map_file'] = self.write('label_map.json', {'0': 'thing', '1': 'other'})
        cfg['ann_file'] = self.write(
            f'odvg_{bool(by_labels)}.jsonl', json.dumps({**image, **(detection if by_labels else grounding)})
        )
        self.prefix(cfg)

    def make_ReIDDataset(self, cfg, classes):
        cfg['ann_file'] = self.write('reid.txt', '\n'.join(f'{name}.jpg {i // 2}' for i, name in enumerate('abab')))
        self.prefix(cfg)

    def make_CustomDataset(self, cfg, classes):
        for folder in 'xy':
            (self.root / 'classes' / folder).mkdir(parents=True, exist_ok=True)
            (self.root / 'classes' / folder / 'a.jpg').write_bytes((self.root / 'images/a.jpg').read_bytes())
        cfg['ann_file'] = self.write('list.txt', 'x/a.jpg 0\ny/a.jpg 1')
        cfg['data_prefix'] = str(self.root / 'classes')
        if 'split' in cfg:
            cfg['split'] = ''
