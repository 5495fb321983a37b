//! Where a GPU is in the machine: its memory node and its link, as the kernel tells.
//!
//! Reads files below `/sys` and nothing else. What cannot be read is unknown, which is never an error: in a container or a
//! virtual machine much of it is missing.

use std::fs;
use std::path::Path;

use kvstore::usize_from;
use rustix::thread::CpuSet;

/// What the kernel tells of a GPU's place.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// Its address on the PCI bus: `0000:3b:00.0`. Empty if unknown.
    pub pci_address: String,
    /// The memory node that its link ends at, where there is more than one.
    pub node: Option<u32>,
    /// Transfers per second and lane that the device's end of the link is made for, in 10⁹: 16 is PCIe 4, 32 is PCIe 5.
    pub link_max_gt: Option<f64>,
    /// The processors of `node`.
    pub(super) cpus: Option<CpuSet>,
}

impl Place {
    /// Reads below `sys`.
    pub(super) fn find(sys: &Path, pci_address: &str) -> Self {
        let device = sys.join("bus/pci/devices").join(pci_address);
        let read = |name: &str| fs::read_to_string(device.join(name)).ok();
        // The kernel says -1 where it does not know.
        let node = read("numa_node").and_then(|text| text.trim().parse().ok());
        let cpus = node.and_then(|node: u32| {
            let list = sys.join(format!("devices/system/node/node{node}/cpulist"));
            parse_cpus(&fs::read_to_string(list).ok()?)
        });
        let link_max_gt = read("max_link_speed").and_then(|text| {
            let number = text.split_whitespace().next()?;
            number.parse().ok()
        });
        Self {
            pci_address: pci_address.to_owned(),
            node,
            link_max_gt,
            cpus,
        }
    }
}

/// Reads a list such as `0-3,8`. None if it is none, or names nobody that can be asked for.
fn parse_cpus(list: &str) -> Option<CpuSet> {
    let mut cpus = CpuSet::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        for cpu in first.parse::<u32>().ok()?..=last.parse::<u32>().ok()? {
            if usize_from(cpu) >= CpuSet::MAX_CPU {
                return None;
            }
            cpus.set(usize_from(cpu));
        }
    }
    (cpus.count() > 0).then_some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().expect("it has one")).expect("a folder");
        fs::write(path, text).expect("a file");
    }

    #[test]
    fn what_the_kernel_tells_is_read() {
        let root = tempfile::tempdir().expect("a folder");
        let device = "bus/pci/devices/0000:3b:00.0";
        write(root.path(), &format!("{device}/numa_node"), "1\n");
        write(
            root.path(),
            &format!("{device}/max_link_speed"),
            "16.0 GT/s PCIe\n",
        );
        write(root.path(), "devices/system/node/node1/cpulist", "8-9,11\n");
        let place = Place::find(root.path(), "0000:3b:00.0");
        assert_eq!((place.node, place.link_max_gt), (Some(1), Some(16.0)));
        let cpus = place.cpus.expect("known");
        let named: Vec<usize> = (0..CpuSet::MAX_CPU)
            .filter(|&cpu| cpus.is_set(cpu))
            .collect();
        assert_eq!(named, [8, 9, 11]);
    }

    #[test]
    fn what_it_does_not_tell_is_unknown() {
        let root = tempfile::tempdir().expect("a folder");
        write(
            root.path(),
            "bus/pci/devices/0000:3b:00.0/numa_node",
            "-1\n",
        );
        write(
            root.path(),
            "bus/pci/devices/0000:3b:00.0/max_link_speed",
            "Unknown\n",
        );
        for address in ["0000:3b:00.0", "0000:ff:00.0"] {
            let place = Place::find(root.path(), address);
            assert_eq!((place.node, place.link_max_gt), (None, None));
            assert!(place.cpus.is_none());
        }
        for list in ["", "a", "3-", "0-70000", "\n"] {
            assert!(parse_cpus(list).is_none(), "{list:?}");
        }
    }
}
