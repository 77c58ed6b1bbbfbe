# RTMDet with EfficientViM-M1 on your own data in COCO format: boxes in one JSON file per split. Copy this file to any
# folder, change the values below, and run `python tools/train.py my_data.py --check` first (docs/your_data.md).
_base_ = 'mmevm::bccd/rtmdet_evm_m1_bccd.py'

# What you will most likely change.
data_root = 'data/bccd_coco/'
classes = ('RBC', 'WBC', 'Platelets')  # as in the annotation files. For one class: ('RBC',), with the comma
image_size = (320, 240)  # width and height: images are resized to fit into it
batch_size = 4
epochs = 40  # 205 images in batches of 4 are 52 iterations per epoch. Pretrained weights need 1,000, random ones 2,000
learning_rate = 1e-3  # of AdamW, for this batch size
init_cfg = None  # random weights. Pretrained: dict(type='Pretrained', checkpoint='timm://efficientvim_m1.e450_in1k')

# Everything below follows from these values.
model = dict(backbone=dict(init_cfg=init_cfg), bbox_head=dict(num_classes=len(classes)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomResize', scale=image_size, ratio_range=(0.7, 1.4), keep_ratio=True),
    dict(type='RandomCrop', crop_size=image_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1)),  # boxes without area make losses infinite
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
dataset = dict(_delete_=True, type='CocoDataset', data_root=data_root, metainfo=dict(classes=classes))
test_dataset = dict(dataset, test_mode=True, pipeline=test_pipeline)

loader = dict(batch_size=batch_size, num_workers=2, persistent_workers=True)
train_dataloader = dict(
    loader,
    dataset=dict(
        dataset,
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        filter_cfg=dict(filter_empty_gt=True),  # False also trains on images without objects
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    loader,
    dataset=dict(test_dataset, ann_file='annotations/val.json', data_prefix=dict(img='val/')),
)
test_dataloader = dict(
    loader,
    dataset=dict(test_dataset, ann_file='annotations/test.json', data_prefix=dict(img='test/')),
)
val_evaluator = dict(_delete_=True, type='CocoMetric', metric='bbox', ann_file=data_root + 'annotations/val.json')
test_evaluator = dict(_delete_=True, type='CocoMetric', metric='bbox', ann_file=data_root + 'annotations/test.json')

train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=max(1, epochs // 10))
optim_wrapper = dict(optimizer=dict(lr=learning_rate))
auto_scale_lr = dict(base_batch_size=batch_size)
default_hooks = dict(checkpoint=dict(interval=max(1, epochs // 10), max_keep_ckpts=3, save_best='auto'))
param_scheduler = [  # warm-up in the first 5 % of the training, whatever the number of images
    dict(type='LinearLR', start_factor=0.001, begin=0, end=epochs / 20, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        begin=epochs / 20,
        end=epochs,
        T_max=epochs - epochs / 20,
        eta_min=learning_rate / 20,
        convert_to_iter_based=True,
    ),
]
