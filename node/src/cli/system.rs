//! What Linux says about this machine.

use std::collections::BTreeSet;
use std::fs;

/// Memory that new programs can have, bounded by this process's control group.
pub fn available_memory_bytes() -> Option<usize> {
    let free = meminfo("MemAvailable")?;
    let group = cgroup_bytes("memory.max").zip(cgroup_bytes("memory.current"));
    Some(group.map_or(free, |(max, used)| free.min(max.saturating_sub(used))))
}

pub fn total_memory_bytes() -> Option<usize> {
    meminfo("MemTotal")
}

/// Most resident memory that this process ever had.
pub fn peak_resident_bytes() -> Option<usize> {
    status_bytes("VmHWM")
}

/// Cores that this process may use, without their hardware threads.
pub fn physical_cores() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    let mut cores = BTreeSet::new();
    for cpu in 0..CPUS_MAX {
        let dir = format!("/sys/devices/system/cpu/cpu{cpu}/topology");
        let read = |name: &str| fs::read_to_string(format!("{dir}/{name}")).ok();
        let Some(core) = read("core_id").zip(read("physical_package_id")) else { break };
        cores.insert(core);
    }
    match cores.len() {
        0 => allowed,
        n => n.min(allowed),
    }
}

pub fn logical_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

pub fn cpu_name() -> Option<String> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn meminfo(key: &str) -> Option<usize> {
    kibibytes(&fs::read_to_string("/proc/meminfo").ok()?, key)
}

fn status_bytes(key: &str) -> Option<usize> {
    kibibytes(&fs::read_to_string("/proc/self/status").ok()?, key)
}

fn kibibytes(text: &str, key: &str) -> Option<usize> {
    let line = text.lines().find(|l| l.split(':').next() == Some(key))?;
    let number: usize = line.split_whitespace().nth(1)?.parse().ok()?;
    number.checked_mul(1024)
}

fn cgroup_bytes(file: &str) -> Option<usize> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|l| l.strip_prefix("0::"))?;
    fs::read_to_string(format!("/sys/fs/cgroup{path}/{file}")).ok()?.trim().parse().ok()
}

const CPUS_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_lines() {
        let text = "MemTotal:       24 kB\nMemAvailable:    8 kB\n";
        assert_eq!(kibibytes(text, "MemAvailable"), Some(8192));
        assert_eq!(kibibytes(text, "Mem"), None);
        assert!(physical_cores() >= 1);
    }
}
