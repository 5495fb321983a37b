//! The way from each NVIDIA GPU to host memory: its PCIe link, its memory node, the IOMMU in between. Files only, below a root that
//! tests replace.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use super::Finding;

/// PCI vendor number of NVIDIA.
const NVIDIA: &str = "0x10de";

/// Widest link there is; what claims more does not know.
const LANES_MAX: u32 = 32;

/// Transfers per second and lane of each generation of PCIe, in 10⁹, as the kernel writes them.
const SPEEDS: [&str; 6] = ["2.5", "5.0", "8.0", "16.0", "32.0", "64.0"];

/// All that is between the GPUs and host memory; nothing where there are no GPUs.
pub(super) fn check(root: &Path) -> Vec<Finding> {
    let gpus = gpus(root);
    let ports = !is_virtual(root);
    let mut findings: Vec<_> = gpus.iter().map(|gpu| link(gpu, ports)).collect();
    findings.extend(nodes(root, &gpus));
    findings.extend(iommu(root, &gpus));
    findings
}

struct Gpu {
    /// On the PCI bus.
    address: String,
    /// Its place in the tree of devices: the folder above is that of the port it is plugged into.
    folder: PathBuf,
}

fn gpus(root: &Path) -> Vec<Gpu> {
    let Ok(entries) = fs::read_dir(root.join("sys/bus/pci/devices")) else {
        return Vec::new();
    };
    let mut gpus: Vec<_> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?.path();
            let display = read(&entry, "class")?.starts_with("0x03");
            let ours = display && read(&entry, "vendor")? == NVIDIA;
            ours.then_some(Gpu {
                address: entry.file_name()?.to_string_lossy().into_owned(),
                folder: fs::canonicalize(&entry).ok()?,
            })
        })
        .collect();
    gpus.sort_by(|a, b| a.address.cmp(&b.address));
    gpus
}

fn read(folder: &Path, name: &str) -> Option<String> {
    let text = fs::read_to_string(folder.join(name)).ok()?;
    Some(text.trim().to_owned())
}

/// `GPU a`, or `GPUs a, b`.
fn named(gpus: &[&str]) -> String {
    let plural = if gpus.len() > 1 { "s" } else { "" };
    format!("GPU{plural} {}", gpus.join(", "))
}

/// Whether this is a virtual machine: the ports that it shows are made up.
fn is_virtual(root: &Path) -> bool {
    let cpus = read(&root.join("proc"), "cpuinfo").unwrap_or_default();
    cpus.split_whitespace().any(|word| word == "hypervisor")
}

/// What one end of a PCIe link runs at, or is made for; unknown parts are none.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Link {
    generation: Option<usize>,
    lanes: Option<u32>,
}

impl Link {
    /// `which` is `current` or `max`.
    fn read(folder: &Path, which: &str) -> Self {
        let speed = read(folder, &format!("{which}_link_speed"));
        let lanes = read(folder, &format!("{which}_link_width"));
        Self {
            generation: speed.as_deref().and_then(generation),
            lanes: lanes
                .and_then(|text| text.parse().ok())
                .filter(|lanes| (1..=LANES_MAX).contains(lanes)),
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.generation {
            Some(generation) => write!(f, "PCIe {generation}")?,
            None => write!(f, "PCIe")?,
        }
        match self.lanes {
            Some(lanes) => write!(f, " x{lanes}"),
            None => write!(f, " of unknown width"),
        }
    }
}

/// `16.0 GT/s PCIe` → 4. Older kernels write `16 GT/s`.
fn generation(speed: &str) -> Option<usize> {
    let number = speed.split_whitespace().next()?;
    let known = SPEEDS
        .iter()
        .position(|known| *known == number || known.strip_suffix(".0") == Some(number));
    known.map(|position| position + 1)
}

/// The link of a GPU bounds how fast KV comes back. `ports` says whether the other end of it is to be believed.
fn link(gpu: &Gpu, ports: bool) -> Finding {
    let area = "pcie";
    let now = Link::read(&gpu.folder, "current");
    let card = Link::read(&gpu.folder, "max");
    let port = gpu.folder.parent().filter(|_| ports);
    let slot = port.map_or_else(Link::default, |folder| Link::read(folder, "max"));
    let address = &gpu.address;
    if card == Link::default() {
        return Finding::note(area, format!("GPU {address}: the system does not tell its link"))
            .do_this("`nvidia-smi -q` shows it under \"GPU Link Info\": it should be as wide and as fast as it can be");
    }
    let mut found = format!("GPU {address}: {now}; the card is made for {card}");
    if slot != Link::default() {
        found.push_str(&format!(", its slot for {slot}"));
    }
    let narrow = less(now.lanes, card.lanes).then_some(
        "KV comes back that much slower: put the card into a full-width slot, reseat it, or free lanes that other devices share",
    );
    let old = less(slot.generation, card.generation).then_some(
        "the slot bounds the link: use one of the card's generation, or raise its link speed in the firmware's settings",
    );
    let actions: Vec<_> = [narrow, old].into_iter().flatten().collect();
    if !actions.is_empty() {
        Finding::warning(area, found).do_this(actions.join("; "))
    } else if less(now.generation, card.generation) {
        Finding::note(area, found).do_this(
            "an idle GPU slows its link down: look again under load, and reseat the card only if it stays slow then",
        )
    } else {
        Finding::ok(area, found)
    }
}

fn less<T: Ord>(this: Option<T>, that: Option<T>) -> bool {
    matches!((this, that), (Some(this), Some(that)) if this < that)
}

/// Whether the arena's pages can be on the GPUs' own memory nodes. The worker takes them from there if it may. A machine of one node
/// has nothing to say.
fn nodes(root: &Path, gpus: &[Gpu]) -> Vec<Finding> {
    let system = root.join("sys/devices/system/node");
    let online = read(&system, "online").and_then(|text| Numbers::parse(&text));
    if online.is_none_or(|nodes| nodes.count() < 2) {
        return Vec::new();
    }
    let mut by_node: BTreeMap<Option<u32>, Vec<&str>> = BTreeMap::new();
    for gpu in gpus {
        // The kernel says -1 where it does not know.
        let node = read(&gpu.folder, "numa_node").and_then(|text| text.parse().ok());
        by_node.entry(node).or_default().push(&gpu.address);
    }
    let allowed = Allowed::read(root);
    let findings = by_node.into_iter().map(|(node, gpus)| match node {
        Some(node) => reach(&system, node, &named(&gpus), &allowed),
        None => Finding::note(
            "memory node",
            format!("{}: the system does not tell it", named(&gpus)),
        )
        .do_this(
            "`nvidia-smi topo -m` may: then start vLLM with numactl --cpunodebind=N --membind=N",
        ),
    });
    findings.collect()
}

/// May this process, and so an engine started like it, use a GPU's node? What is not known is not held against it.
fn reach(system: &Path, node: u32, gpus: &str, allowed: &Allowed) -> Finding {
    let area = "memory node";
    let with_memory = read(system, "has_memory").and_then(|text| Numbers::parse(&text));
    if with_memory.is_some_and(|nodes| !nodes.contains(node)) {
        return Finding::warning(area, format!("{gpus}: node {node}, which has no memory"))
            .do_this("put memory modules beside that processor: until then every copy crosses to another one");
    }
    let cpus = read(&system.join(format!("node{node}")), "cpulist");
    let near = cpus.as_deref().and_then(Numbers::parse);
    let runs = match (&near, &allowed.cpus) {
        (Some(near), Some(allowed)) => near.overlaps(allowed),
        _ => true,
    };
    let takes = allowed
        .nodes
        .as_ref()
        .is_none_or(|nodes| nodes.contains(node));
    let lacks = match (runs, takes) {
        (true, true) => return Finding::ok(area, format!("{gpus}: node {node}")),
        (false, true) => "where this process may not run",
        (true, false) => "whose memory this process may not take",
        (false, false) => "where this process may neither run nor take memory",
    };
    let cpus = cpus.unwrap_or_default();
    Finding::warning(area, format!("{gpus}: node {node}, {lacks}")).do_this(format!(
        "start vLLM with numactl --cpunodebind={node} --membind={node}; a container needs --cpuset-cpus={cpus} --cpuset-mems={node}"
    ))
}

/// Where this process may run and take memory; none where it cannot be told.
struct Allowed {
    cpus: Option<Numbers>,
    nodes: Option<Numbers>,
}

impl Allowed {
    fn read(root: &Path) -> Self {
        let own = root.join("proc/self");
        let status = read(&own, "status").unwrap_or_default();
        let list = |name| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            Numbers::parse(line)
        };
        Self {
            cpus: list("Cpus_allowed_list:"),
            nodes: bound_to(&own).or_else(|| list("Mems_allowed_list:")),
        }
    }
}

/// What `numactl --membind` asked for, which the list of allowed nodes does not show: `55d0… bind:0 file=…`.
fn bound_to(own: &Path) -> Option<Numbers> {
    let maps = read(own, "numa_maps")?;
    let policy = maps.split_whitespace().nth(1)?;
    let (kind, nodes) = policy.split_once(':')?;
    if kind == "bind" || kind.starts_with("bind=") {
        Numbers::parse(nodes)
    } else {
        None
    }
}

/// The kernel's way to write a set of numbers: `0-3,8`.
struct Numbers(Vec<RangeInclusive<u32>>);

impl Numbers {
    /// None for what is no list, and for an empty one.
    fn parse(text: &str) -> Option<Self> {
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.parse().ok()?..=last.parse().ok()?)
        };
        let ranges: Option<Vec<_>> = text.trim().split(',').map(range).collect();
        ranges.map(Self)
    }

    fn count(&self) -> usize {
        self.0.iter().map(|range| range.clone().count()).sum()
    }

    fn contains(&self, number: u32) -> bool {
        self.0.iter().any(|range| range.contains(&number))
    }

    fn overlaps(&self, other: &Self) -> bool {
        let meet = |a: &RangeInclusive<u32>, b: &RangeInclusive<u32>| {
            a.start() <= b.end() && b.start() <= a.end()
        };
        self.0.iter().any(|a| other.0.iter().any(|b| meet(a, b)))
    }
}

/// What is done to the addresses that a GPU uses.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Translation {
    /// No IOMMU in between.
    None,
    /// There is one, and it lets addresses through as they are.
    Identity,
    /// Every page has to be entered into its tables.
    Tables(String),
    Unknown,
}

fn iommu(root: &Path, gpus: &[Gpu]) -> Vec<Finding> {
    let area = "iommu";
    let mut by_translation: BTreeMap<Translation, Vec<&str>> = BTreeMap::new();
    for gpu in gpus {
        let found = translation(root, gpu);
        by_translation.entry(found).or_default().push(&gpu.address);
    }
    let action = "add iommu=pt to the kernel's command line: registering the arena and small copies become cheaper";
    let findings = by_translation.into_iter().map(|(found, gpus)| {
        let gpus = named(&gpus);
        match found {
            Translation::None => Finding::ok(area, format!("{gpus}: none in between")),
            Translation::Identity => Finding::ok(area, format!("{gpus}: passes addresses through")),
            Translation::Tables(kind) => {
                Finding::note(area, format!("{gpus}: translates every address ({kind})"))
                    .do_this(action)
            }
            Translation::Unknown => Finding::note(
                area,
                format!("{gpus}: on, and the system does not tell its mode"),
            )
            .do_this(action),
        }
    });
    findings.collect()
}

fn translation(root: &Path, gpu: &Gpu) -> Translation {
    let group = gpu.folder.join("iommu_group");
    if fs::symlink_metadata(&group).is_err() {
        return Translation::None;
    }
    match read(&group, "type") {
        Some(kind) if kind == "identity" => return Translation::Identity,
        Some(kind) if kind.starts_with("DMA") => return Translation::Tables(kind),
        _ => {}
    }
    // Older kernels do not tell what a group does; they were told at their start.
    let told = read(&root.join("proc"), "cmdline").unwrap_or_default();
    let through = |word: &str| matches!(word, "iommu=pt" | "iommu.passthrough=1");
    if told.split_whitespace().any(through) {
        Translation::Identity
    } else {
        Translation::Unknown
    }
}

#[cfg(test)]
mod tests;
