"""Files of public data sets, named as their authors name them, and what they are; without any pattern.

A line: image | patient | split it is officially in | masks, with + between them. Lines that begin with -
are files that are neither image nor mask of a case; those with = are tables, their rows divided by slashes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tree:
    """A small tree in the official layout."""

    text: str
    values: tuple[int, ...] = (0, 1)
    """What the masks hold."""
    ids: tuple[int, ...] = (0, 1)
    """The label ids that these mean."""
    variant: str = ""


def _msd(name: str, labels: int) -> Tree:
    return Tree(
        f"""
        imagesTr/{name}_003.nii.gz | {name}_003 | | labelsTr/{name}_003.nii.gz
        imagesTr/{name}_004.nii.gz | {name}_004 | | labelsTr/{name}_004.nii.gz
        imagesTs/{name}_009.nii.gz | {name}_009 | |
        """,
        tuple(range(labels + 1)),
        tuple(range(labels + 1)),
    )


_ISLES = "derivatives/sub-strokecase0001/ses-0001/sub-strokecase0001_ses-0001_msk.nii.gz"
_ATLAS = "sub-r001s001/ses-1/anat/sub-r001s001_ses-1_space-MNI152NLin2009aSym"
_MSD_IDS = {"liver": 2, "pancreas": 2, "lung": 1, "heart": 1, "spleen": 1, "colon": 1}

TREES = {
    **{f"msd_{name}": _msd({"heart": "la"}.get(name, name), labels) for name, labels in _MSD_IDS.items()},
    "msd_hepatic_vessel": _msd("hepaticvessel", 2),
    "msd_brain_tumour": _msd("BRATS", 3),
    "msd_prostate": _msd("prostate", 2),
    "msd_hippocampus": Tree(
        """
        imagesTr/hippocampus_001.nii.gz | person-0001 | | labelsTr/hippocampus_001.nii.gz
        imagesTr/hippocampus_002.nii.gz | person-0001 | | labelsTr/hippocampus_002.nii.gz
        imagesTr/hippocampus_003.nii.gz | person-0002 | | labelsTr/hippocampus_003.nii.gz
        """,
        (0, 1, 2),
        (0, 1, 2),
    ),
    "acdc": Tree(
        """
        database/training/patient001/patient001_frame01.nii.gz | patient001 | | \
            database/training/patient001/patient001_frame01_gt.nii.gz
        database/training/patient001/patient001_frame12.nii.gz | patient001 | | \
            database/training/patient001/patient001_frame12_gt.nii.gz
        database/testing/patient101/patient101_frame14.nii.gz | patient101 | test | \
            database/testing/patient101/patient101_frame14_gt.nii.gz
        - database/training/patient001/patient001_4d.nii.gz
        - database/training/patient001/Info.cfg
        """,
        (0, 1, 2, 3),
        (0, 1, 2, 3),
    ),
    "promise12": Tree(
        """
        training_data/Case00.mhd | Case00 | | training_data/Case00_segmentation.mhd
        training_data/Case01.mhd | Case01 | | training_data/Case01_segmentation.mhd
        - test_data/Case00.mhd
        - training_data/Case00.raw
        """
    ),
    "nci_isbi_prostate": Tree(
        """
        PROSTATE-3T/Prostate3T-01-0001/11-01-2005-NA-37755/1.000000-t2tsetra-23461/ | Prostate3T-01-0001 | | \
            Training/Prostate3T-01-0001.nrrd
        """,
        (0, 1, 2),
        (0, 1, 2),
    ),
    "prostate_multisite": Tree(
        """
        RUNMC/Case00.nii.gz | RUNMC-00 | | RUNMC/Case00_segmentation.nii.gz
        BMC/Case05.nii.gz | BMC-05 | | BMC/Case05_Segmentation.nii.gz
        """,
        (0, 1, 2),
        (0, 1),
    ),
    "brats2021": Tree(
        """
        BraTS2021_00000/BraTS2021_00000_t1ce.nii.gz | BraTS2021_00000 | | \
            BraTS2021_00000/BraTS2021_00000_seg.nii.gz
        - BraTS2021_00000/BraTS2021_00000_flair.nii.gz
        - BraTS2021_00000/BraTS2021_00000_t1.nii.gz
        - BraTS2021_00000/BraTS2021_00000_t2.nii.gz
        """,
        (0, 1, 2, 4),
        (0, 1, 2, 4),
        variant="t1ce",
    ),
    "brats2023_glioma": Tree(
        """
        BraTS-GLI-00002-000/BraTS-GLI-00002-000-t2f.nii.gz | BraTS-GLI-00002 | | \
            BraTS-GLI-00002-000/BraTS-GLI-00002-000-seg.nii.gz
        BraTS-GLI-00002-001/BraTS-GLI-00002-001-t2f.nii.gz | BraTS-GLI-00002 | | \
            BraTS-GLI-00002-001/BraTS-GLI-00002-001-seg.nii.gz
        - BraTS-GLI-00002-000/BraTS-GLI-00002-000-t1c.nii.gz
        """,
        (0, 1, 2, 3),
        (0, 1, 2, 3),
    ),
    "brats2015_sample": Tree(
        """
        brats_2013_pat0004_1/Flair_subtrMeanDivStd.nii.gz | brats_2013_pat0004 | | \
            brats_2013_pat0004_1/OTMultiClass.nii.gz
        brats_2013_pat0006_1/Flair_subtrMeanDivStd.nii.gz | brats_2013_pat0006 | | \
            brats_2013_pat0006_1/OTMultiClass.nii.gz
        - brats_2013_pat0004_1/T1c_subtrMeanDivStd.nii.gz
        - brats_2013_pat0004_1/brainmask.nii.gz
        """,
        (0, 1, 4),
        (0, 1, 4),
    ),
    "amos22": Tree(
        """
        amos22/imagesTr/amos_0001.nii.gz | amos_0001 | | amos22/labelsTr/amos_0001.nii.gz
        amos22/imagesVa/amos_0008.nii.gz | amos_0008 | | amos22/labelsVa/amos_0008.nii.gz
        amos22/imagesTs/amos_0003.nii.gz | amos_0003 | |
        - amos22/imagesTr/amos_0507.nii.gz
        - amos22/dataset.json
        """,
        (0, 6, 15),
        (0, 6, 15),
    ),
    "btcv": Tree(
        """
        RawData/Training/img/img0001.nii.gz | img0001 | | RawData/Training/label/label0001.nii.gz
        RawData/Testing/img/img0061.nii.gz | img0061 | |
        """,
        (0, 13),
        (0, 13),
    ),
    "kits19": Tree(
        """
        data/case_00000/imaging.nii.gz | case_00000 | | data/case_00000/segmentation.nii.gz
        data/case_00210/imaging.nii.gz | case_00210 | |
        - data/kits.json
        """,
        (0, 1, 2),
        (0, 1, 2),
    ),
    "kits23": Tree(
        """
        dataset/case_00000/imaging.nii.gz | case_00000 | | dataset/case_00000/segmentation.nii.gz
        - dataset/case_00000/instances/kidney_instance-1_annotation-1.nii.gz
        """,
        (0, 1, 2, 3),
        (0, 1, 2, 3),
    ),
    "lits": Tree(
        """
        Training Batch 1/volume-0.nii | volume-0 | | Training Batch 1/segmentation-0.nii
        Training Batch 2/volume-28.nii | volume-28 | | Training Batch 2/segmentation-28.nii
        - test/test-volume-0.nii
        """,
        (0, 1, 2),
        (0, 1, 2),
    ),
    "totalsegmentator_mr": Tree(
        """
        s0001/mri.nii.gz | s0001 | | s0001/segmentations/liver.nii.gz + s0001/segmentations/spleen.nii.gz
        """,
        (0, 1),
        (0, 1, 5),
    ),
    "totalsegmentator_ct": Tree(
        """
        s0000/ct.nii.gz | s0000 | | s0000/segmentations/liver.nii.gz + s0000/segmentations/sternum.nii.gz
        s0011/ct.nii.gz | s0011 | test | s0011/segmentations/liver.nii.gz + s0011/segmentations/sternum.nii.gz
        = meta.csv = image_id;age;split/s0000;64;train/s0011;50;test
        """,
        (0, 1),
        (0, 5, 116),
    ),
    "chaos": Tree(
        """
        Train_Sets/MR/1/T1DUAL/DICOM_anon/InPhase/ | mr-1 | |
        - Train_Sets/MR/1/T1DUAL/Ground/IMG-0004-00002.png
        - Train_Sets/MR/1/T1DUAL/DICOM_anon/OutPhase/IMG-0004-00001.dcm
        - Train_Sets/CT/1/DICOM_anon/i0000,0000b.dcm
        """,
        variant="t1_in",
    ),
    "word": Tree(
        """
        imagesTr/word_0002.nii.gz | word_0002 | | labelsTr/word_0002.nii.gz
        imagesVal/word_0001.nii.gz | word_0001 | val | labelsVal/word_0001.nii.gz
        imagesTs/word_0014.nii.gz | word_0014 | test | labelsTs/word_0014.nii.gz
        """,
        (0, 16),
        (0, 16),
    ),
    "flare22": Tree(
        """
        FLARE22Train/images/FLARE22_Tr_0001_0000.nii.gz | tr-0001 | | \
            FLARE22Train/labels/FLARE22_Tr_0001.nii.gz
        Unlabeled/Case_00001_0000.nii.gz | unlabelled-00001 | |
        """,
        (0, 13),
        (0, 13),
    ),
    "segthor": Tree(
        "train/Patient_01/Patient_01.nii.gz | Patient_01 | | train/Patient_01/GT.nii.gz",
        (0, 1, 2, 3, 4),
        (0, 1, 2, 3, 4),
    ),
    "mnms2": Tree(
        """
        MnM2/dataset/001/001_SA_ED.nii.gz | 001 | | MnM2/dataset/001/001_SA_ED_gt.nii.gz
        MnM2/dataset/001/001_SA_ES.nii.gz | 001 | | MnM2/dataset/001/001_SA_ES_gt.nii.gz
        MnM2/dataset/160/160_SA_ED.nii.gz | 160 | | MnM2/dataset/160/160_SA_ED_gt.nii.gz
        MnM2/dataset/161/161_SA_ED.nii.gz | 161 | val | MnM2/dataset/161/161_SA_ED_gt.nii.gz
        MnM2/dataset/200/200_SA_ES.nii.gz | 200 | val | MnM2/dataset/200/200_SA_ES_gt.nii.gz
        MnM2/dataset/201/201_SA_ED.nii.gz | 201 | test | MnM2/dataset/201/201_SA_ED_gt.nii.gz
        MnM2/dataset/360/360_SA_ED.nii.gz | 360 | test | MnM2/dataset/360/360_SA_ED_gt.nii.gz
        - MnM2/dataset/001/001_LA_ED.nii.gz
        - MnM2/dataset/001/001_LA_ED_gt.nii.gz
        - MnM2/dataset/001/001_LA_CINE.nii.gz
        - MnM2/dataset/001/001_SA_CINE.nii.gz
        - MnM2/dataset_information.csv
        """,
        (0, 1, 2, 3),
        (0, 1, 2, 3),
    ),
    "jsrt_mini": Tree(
        """
        Segmentation01/train/org/1.png | train-1 | | Segmentation01/train/label/1.png
        Segmentation01/train/org/50.png | train-50 | | Segmentation01/train/label/50.png
        Segmentation01/test/org/0.png | test-0 | test | Segmentation01/test/label/0.png
        Segmentation01/test/org/1.png | test-1 | test | Segmentation01/test/label/1.png
        """,
        (0, 255),
    ),
    "camus": Tree(
        """
        database_nifti/patient0001/patient0001_2CH_ED.nii.gz | patient0001 | | \
            database_nifti/patient0001/patient0001_2CH_ED_gt.nii.gz
        database_nifti/patient0001/patient0001_4CH_ES.nii.gz | patient0001 | | \
            database_nifti/patient0001/patient0001_4CH_ES_gt.nii.gz
        - database_nifti/patient0001/patient0001_2CH_half_sequence.nii.gz
        - database_nifti/patient0001/patient0001_2CH_half_sequence_gt.nii.gz
        - database_split/subgroup_testing.txt
        """,
        (0, 1, 2, 3),
        (0, 1, 2, 3),
    ),
    "busi": Tree(
        """
        Dataset_BUSI_with_GT/benign/benign (1).png | benign-1 | | \
            Dataset_BUSI_with_GT/benign/benign (1)_mask.png
        Dataset_BUSI_with_GT/benign/benign (4).png | benign-4 | | \
            Dataset_BUSI_with_GT/benign/benign (4)_mask.png \
            + Dataset_BUSI_with_GT/benign/benign (4)_mask_1.png
        Dataset_BUSI_with_GT/normal/normal (1).png | normal-1 | | \
            Dataset_BUSI_with_GT/normal/normal (1)_mask.png
        """,
        (0, 255),
    ),
    "bus_bra": Tree(
        """
        BUSBRA/Images/bus_0001-l.png | 0001 | | BUSBRA/Masks/mask_0001-l.png
        BUSBRA/Images/bus_0001-r.png | 0001 | | BUSBRA/Masks/mask_0001-r.png
        - BUSBRA/bus_data.csv
        """,
        (0, 255),
    ),
    "mmotu": Tree(
        """
        OTU_2d/images/1.JPG | 1 | | OTU_2d/annotations/1_binary.PNG
        - OTU_2d/annotations/1.PNG
        - OTU_2d/annotations/1_binary_binary.PNG
        - OTU_2d/train.txt
        """,
        (0, 255),
    ),
    "tn3k": Tree(
        """
        Thyroid Dataset/tn3k/trainval-image/0000.jpg | trainval-0000 | | \
            Thyroid Dataset/tn3k/trainval-mask/0000.jpg
        Thyroid Dataset/tn3k/test-image/0000.jpg | test-0000 | test | \
            Thyroid Dataset/tn3k/test-mask/0000.jpg
        - Thyroid Dataset/tn3k/tn3k-trainval-fold0.json
        """,
        (0, 255),
    ),
    "montgomery": Tree(
        """
        MontgomerySet/CXR_png/MCUCXR_0001_0.png | MCUCXR_0001 | | \
            MontgomerySet/ManualMask/rightMask/MCUCXR_0001_0.png \
            + MontgomerySet/ManualMask/leftMask/MCUCXR_0001_0.png
        - MontgomerySet/ClinicalReadings/MCUCXR_0001_0.txt
        """,
        (0, 255),
        (0, 1, 2),
    ),
    "shenzhen": Tree(
        """
        ChinaSet_AllFiles/CXR_png/CHNCXR_0001_0.png | CHNCXR_0001 | | mask/CHNCXR_0001_0_mask.png
        ChinaSet_AllFiles/CXR_png/CHNCXR_0025_0.png | CHNCXR_0025 | |
        """,
        (0, 255),
    ),
    "covid_cxr": Tree(
        """
        images/ards-of-a-snake-bite.png | 27 | | lung_masks/ards-of-a-snake-bite.png
        images/pneumonia-day-0.jpg | 92 | | lung_masks/pneumonia-day-0.png
        = cases.csv = image,lung_mask,patientid/ards-of-a-snake-bite.png,,27/pneumonia-day-0.jpg,,92
        """,
        (0, 1, 2),
        (0, 1, 2),
    ),
    "nih_chest_xray14": Tree(
        """
        images_001/images/00000001_000.png | 00000001 | |
        images_001/images/00000001_001.png | 00000001 | |
        - Data_Entry_2017.csv
        """
    ),
    "duke_breast_mri": Tree(
        """
        Duke-Breast-Cancer-MRI/Breast_MRI_001/01-01-1990-NA-MRI BREAST-51972/6.000000-ax dyn 1st pass-59417/ \
            | Breast_MRI_001 | |
        """
    ),
    "autopet": Tree(
        """
        FDG-PET-CT-Lesions/PETCT_0011f3deaf/03-23-2003-NA-PET-CT Ganzkoerper-10445/SUV.nii.gz \
            | PETCT_0011f3deaf | | \
            FDG-PET-CT-Lesions/PETCT_0011f3deaf/03-23-2003-NA-PET-CT Ganzkoerper-10445/SEG.nii.gz
        - FDG-PET-CT-Lesions/PETCT_0011f3deaf/03-23-2003-NA-PET-CT Ganzkoerper-10445/CTres.nii.gz
        - FDG-PET-CT-Lesions/PETCT_0011f3deaf/03-23-2003-NA-PET-CT Ganzkoerper-10445/PET.nii.gz
        """
    ),
    "hecktor22": Tree(
        """
        hecktor2022_training/imagesTr/CHUM-001__CT.nii.gz | CHUM-001 | | \
            hecktor2022_training/labelsTr/CHUM-001.nii.gz
        - hecktor2022_training/imagesTr/CHUM-001__PT.nii.gz
        """,
        (0, 1, 2),
        (0, 1, 2),
    ),
    "isles22": Tree(
        f"""
        sub-strokecase0001/ses-0001/dwi/sub-strokecase0001_ses-0001_dwi.nii.gz | sub-strokecase0001 | | \
            {_ISLES}
        - sub-strokecase0001/ses-0001/dwi/sub-strokecase0001_ses-0001_adc.nii.gz
        """
    ),
    "atlas2": Tree(
        f"""
        Training/R001/{_ATLAS}_T1w.nii.gz | sub-r001s001 | | \
            Training/R001/{_ATLAS}_label-L_desc-T1lesion_mask.nii.gz
        """
    ),
    "mm_whs": Tree(
        """
        mr_train/mr_train_1001_image.nii.gz | mr-1001 | | mr_train/mr_train_1001_label.nii.gz
        - mr_test/mr_test_2001_image.nii.gz
        - ct_train/ct_train_1001_image.nii.gz
        """,
        (0, 205, 420, 421, 500, 550, 600, 820, 850),
        (0, 1, 2, 3, 4, 5, 6, 7),
        variant="mr",
    ),
    "covid19_ct": Tree(
        """
        COVID-19-CT-Seg_20cases/coronacases_001.nii.gz | coronacases_001 | | \
            Lung_and_Infection_Mask/coronacases_001.nii.gz
        COVID-19-CT-Seg_20cases/radiopaedia_10_85902_1.nii.gz | radiopaedia_10_85902_1 | | \
            Lung_and_Infection_Mask/radiopaedia_10_85902_1.nii.gz
        """,
        (0, 1, 2, 3),
        (0, 1, 2, 3),
    ),
    "la2018": Tree(
        """
        Training Set/0RZDK210BSMWAA6467LU/lgemri.nrrd | 0RZDK210BSMWAA6467LU | | \
            Training Set/0RZDK210BSMWAA6467LU/laendo.nrrd
        Testing Set/4498F1FTRMMQHZW8VELA/lgemri.nrrd | 4498F1FTRMMQHZW8VELA | test | \
            Testing Set/4498F1FTRMMQHZW8VELA/laendo.nrrd
        - Training Set/0RZDK210BSMWAA6467LU/lawall.nrrd
        """,
        (0, 255),
    ),
    "ixi": Tree(
        """
        IXI002-Guys-0828-T1.nii.gz | IXI002 | |
        - IXI002-Guys-0828-T2.nii.gz
        """
    ),
}
