//! Tests of the findings on made-up `/sys` and `/proc` trees.

use super::super::Severity;
use super::super::tests::Root;
use super::*;

const ADDRESS: &str = "0000:01:00.0";

impl Root {
    /// A GPU of PCIe 4 x16 in a slot of its own, which the kernel says nothing of.
    fn gpu(&self, address: &str) -> &Self {
        for (name, text) in [
            ("vendor", NVIDIA),
            ("class", "0x030200"),
            ("max_link_speed", "16.0 GT/s PCIe"),
            ("max_link_width", "16"),
            ("current_link_speed", "16.0 GT/s PCIe"),
            ("current_link_width", "16"),
        ] {
            self.of_gpu(address, name, text);
        }
        let place = format!("sys/devices/pci0000:00/port-{address}/{address}");
        self.link(&format!("sys/bus/pci/devices/{address}"), &place)
    }

    fn of_gpu(&self, address: &str, name: &str, text: &str) -> &Self {
        let folder = format!("sys/devices/pci0000:00/port-{address}/{address}");
        self.file(&format!("{folder}/{name}"), text)
    }

    fn of_port(&self, address: &str, name: &str, text: &str) -> &Self {
        let folder = format!("sys/devices/pci0000:00/port-{address}");
        self.file(&format!("{folder}/{name}"), text)
    }

    /// The only finding about the links.
    fn pcie(&self) -> Finding {
        let mut found = self.findings("pcie");
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }

    fn findings(&self, area: &str) -> Vec<Finding> {
        let mut found = check(self.path());
        found.retain(|finding| finding.area == area);
        found
    }

    /// Two nodes of four processors, the GPU on the second.
    fn two_nodes(&self) -> &Self {
        self.gpu(ADDRESS).of_gpu(ADDRESS, "numa_node", "1");
        let folder = "sys/devices/system/node";
        for (name, text) in [
            ("online", "0-1"),
            ("has_memory", "0-1"),
            ("node0/cpulist", "0-3"),
            ("node1/cpulist", "4-7"),
        ] {
            self.file(&format!("{folder}/{name}"), text);
        }
        self
    }

    fn may_use(&self, cpus: &str, nodes: &str) -> &Self {
        let status = format!("Name:\tx\nCpus_allowed_list:\t{cpus}\nMems_allowed_list:\t{nodes}");
        self.file("proc/self/status", &status)
    }

    fn node(&self) -> Finding {
        let mut found = self.findings("memory node");
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }

    fn grouped(&self, address: &str, number: &str) -> &Self {
        let place = format!("sys/devices/pci0000:00/port-{address}/{address}/iommu_group");
        self.link(&place, &format!("sys/kernel/iommu_groups/{number}"))
    }
}

#[test]
fn without_gpus_there_is_nothing_to_say() {
    let root = Root::new();
    assert_eq!(check(root.path()), []);
    root.gpu(ADDRESS).of_gpu(ADDRESS, "vendor", "0x8086");
    root.gpu("0000:02:00.0")
        .of_gpu("0000:02:00.0", "class", "0x040300");
    assert_eq!(check(root.path()), []);
}

#[test]
fn a_link_at_its_best_is_well() {
    let root = Root::new();
    root.gpu(ADDRESS);
    let text = format!("GPU {ADDRESS}: PCIe 4 x16; the card is made for PCIe 4 x16");
    assert_eq!(root.pcie(), Finding::ok("pcie", text.clone()));
    root.of_port(ADDRESS, "max_link_speed", "32 GT/s")
        .of_port(ADDRESS, "max_link_width", "16");
    assert_eq!(
        root.pcie(),
        Finding::ok("pcie", text + ", its slot for PCIe 5 x16")
    );
}

#[test]
fn a_narrow_link_is_a_warning() {
    let root = Root::new();
    root.gpu(ADDRESS).of_gpu(ADDRESS, "current_link_width", "8");
    assert_eq!(root.pcie().severity, Severity::Warning);
    assert!(
        root.pcie()
            .found
            .contains("PCIe 4 x8; the card is made for PCIe 4 x16")
    );
}

#[test]
fn an_old_slot_is_a_warning_except_in_a_virtual_machine() {
    let root = Root::new();
    root.gpu(ADDRESS)
        .of_port(ADDRESS, "max_link_speed", "8.0 GT/s PCIe");
    root.of_gpu(ADDRESS, "current_link_speed", "8.0 GT/s PCIe");
    assert_eq!(root.pcie().severity, Severity::Warning);
    assert!(
        root.pcie()
            .found
            .ends_with("its slot for PCIe 3 of unknown width")
    );
    root.of_gpu(ADDRESS, "current_link_width", "4");
    let action = root.pcie().action.unwrap();
    assert!(
        action.contains("reseat") && action.contains("the slot bounds"),
        "{action}"
    );
    root.of_gpu(ADDRESS, "current_link_width", "16");
    root.of_gpu(ADDRESS, "current_link_speed", "16.0 GT/s PCIe");
    root.file("proc/cpuinfo", "flags\t\t: fpu hypervisor lahf_lm");
    assert_eq!(root.pcie().severity, Severity::Ok);
}

#[test]
fn a_link_that_is_slow_now_may_be_idle() {
    let root = Root::new();
    root.gpu(ADDRESS)
        .of_gpu(ADDRESS, "current_link_speed", "2.5 GT/s PCIe");
    assert_eq!(root.pcie().severity, Severity::Note);
    assert!(root.pcie().action.unwrap().contains("under load"));
}

#[test]
fn a_link_that_is_not_told_is_unknown() {
    let root = Root::new();
    root.gpu(ADDRESS);
    for (name, text) in [
        ("max_link_speed", "Unknown"),
        ("max_link_width", "255"),
        ("current_link_speed", "Unknown"),
        ("current_link_width", "0"),
    ] {
        root.of_gpu(ADDRESS, name, text);
    }
    assert_eq!(root.pcie().severity, Severity::Note);
    assert!(root.pcie().found.contains("does not tell"));
}

#[test]
fn a_machine_of_one_node_has_nothing_to_say() {
    let root = Root::new();
    root.two_nodes();
    assert_eq!(
        root.node().severity,
        Severity::Ok,
        "what is unknown is allowed"
    );
    root.file("sys/devices/system/node/online", "0");
    assert_eq!(root.findings("memory node"), []);
    let unknown = Root::new();
    unknown.gpu(ADDRESS);
    assert_eq!(unknown.findings("memory node"), []);
}

#[test]
fn a_process_must_be_allowed_on_the_node_of_its_gpu() {
    let root = Root::new();
    root.two_nodes();
    for (cpus, nodes, says) in [
        ("0-7", "0-1", "node 1"),
        ("0-2,7", "1", "node 1"),
        ("0-3", "0-1", "may not run"),
        ("0-7", "0", "may not take"),
        ("3", "0", "neither run nor take"),
    ] {
        let found = root.may_use(cpus, nodes).node();
        let well = says == "node 1";
        assert_eq!(
            found.severity == Severity::Ok,
            well,
            "{cpus} {nodes} {found:?}"
        );
        assert!(found.found.contains(says), "{found:?}");
    }
    let action = root.node().action.unwrap();
    assert!(
        action.contains("--membind=1") && action.contains("--cpuset-cpus=4-7"),
        "{action}"
    );
}

#[test]
fn a_memory_policy_counts_as_well() {
    let root = Root::new();
    root.two_nodes().may_use("0-7", "0-1");
    for (policy, severity) in [
        ("default", Severity::Ok),
        ("interleave:0", Severity::Ok),
        ("bind:1", Severity::Ok),
        ("bind:0", Severity::Warning),
        ("bind=static:0", Severity::Warning),
    ] {
        root.file(
            "proc/self/numa_maps",
            &format!("55d000 {policy} file=/bin/x\n7f00 default"),
        );
        assert_eq!(root.node().severity, severity, "{policy}");
    }
}

#[test]
fn a_node_without_memory_and_an_unknown_one_are_told() {
    let root = Root::new();
    root.two_nodes()
        .file("sys/devices/system/node/has_memory", "0");
    assert_eq!(root.node().severity, Severity::Warning);
    assert!(root.node().found.contains("no memory"));
    root.of_gpu(ADDRESS, "numa_node", "-1");
    assert_eq!(root.node().severity, Severity::Note);
}

#[test]
fn an_iommu_that_translates_is_noted() {
    let root = Root::new();
    root.gpu(ADDRESS);
    let found = || root.findings("iommu").remove(0);
    assert_eq!(
        found(),
        Finding::ok("iommu", format!("GPU {ADDRESS}: none in between"))
    );
    root.grouped(ADDRESS, "7");
    assert!(found().found.contains("does not tell"));
    root.file("proc/cmdline", "quiet iommu=pt");
    assert_eq!(found().severity, Severity::Ok);
    for (kind, severity) in [
        ("DMA", Severity::Note),
        ("DMA-FQ", Severity::Note),
        ("identity", Severity::Ok),
    ] {
        root.file("sys/kernel/iommu_groups/7/type", kind);
        assert_eq!(found().severity, severity, "{kind}");
    }
}

#[test]
fn gpus_that_are_alike_are_told_together() {
    let root = Root::new();
    root.two_nodes()
        .gpu("0000:02:00.0")
        .of_gpu("0000:02:00.0", "numa_node", "1");
    root.gpu("0000:03:00.0")
        .of_gpu("0000:03:00.0", "numa_node", "0");
    let found: Vec<_> = root
        .findings("memory node")
        .into_iter()
        .map(|f| f.found)
        .collect();
    assert_eq!(
        found,
        [
            "GPU 0000:03:00.0: node 0",
            "GPUs 0000:01:00.0, 0000:02:00.0: node 1"
        ]
    );
    assert_eq!(root.findings("iommu").len(), 1);
    assert_eq!(root.findings("pcie").len(), 3);
}

#[test]
fn lists_of_numbers_are_read() {
    let numbers = |text| Numbers::parse(text);
    assert_eq!(numbers("0-3,8\n").unwrap().count(), 5);
    assert!(numbers("").is_none());
    assert!(numbers("0-x").is_none());
    assert!(numbers("2-5").unwrap().overlaps(&numbers("0,4").unwrap()));
    assert!(!numbers("2-5").unwrap().overlaps(&numbers("0-1,6").unwrap()));
}
