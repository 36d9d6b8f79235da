//! A BPF file system that no path leads to.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

/// A BPF file system that is mounted nowhere. It ends, with all pins in it, when this is dropped.
#[derive(Debug)]
pub struct DetachedBpffs {
    /// Keeps the mount alive.
    _root: OwnedFd,
    path: PathBuf,
}

impl DetachedBpffs {
    /// Makes one (`fsopen(2)`, `fsmount(2)`).
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN`; `ENODEV` where the kernel has no bpffs.
    pub fn new() -> io::Result<Self> {
        let context = fsopen("bpf", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(&context)?;
        let root = fsmount(
            &context,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::empty(),
        )?;
        let path = format!("/proc/self/fd/{}", root.as_raw_fd()).into();
        Ok(Self { _root: root, path })
    }

    /// The root directory of the file system, as this process reaches it.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::bpf;
    use aya_obj::generated::bpf_map_type::BPF_MAP_TYPE_ARRAY;

    #[test]
    fn objects_can_be_pinned_until_it_is_dropped() {
        let bpffs = DetachedBpffs::new().expect("a BPF file system");
        let map = testbpf::map_create(&testbpf::MapSpec::new(BPF_MAP_TYPE_ARRAY, "pinned"))
            .expect("a map");
        let directory = bpffs.path().join("directory");
        std::fs::create_dir(&directory).expect("a directory");
        let pin = directory.join("pin");
        bpf::obj_pin(&map, &pin).expect("pinned");
        let opened = bpf::obj_get(&pin).expect("opened");
        assert_eq!(bpf::map_info(opened).ok(), bpf::map_info(&map).ok());
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
        drop(bpffs);
        assert_eq!(
            std::fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted"),
            mounts,
            "it is in no mount namespace"
        );
        assert!(bpf::obj_get(&pin).is_err());
    }
}
