//! What this host can do at best, for its node record: measured once, while nothing runs, and kept.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kernels::isa::Isa;
use kernels::measure::{measure, memory_bytes};
use kernels::pool::ThreadPool;
use protocol::node_record::ReplicaState;
use serde::{Deserialize, Serialize};

use crate::http::App;

/// Rates of all threads together; 0 where they are not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    /// Bytes read from memory per second.
    pub memory_bytes_per_s: u64,
    /// Eight-bit integer operations per second; a multiply-add is two. 0 without VNNI.
    pub int8_ops_per_s: u64,
}

/// What is measured, and with what.
pub struct Host {
    /// Its CPU's name: with another one it is measured again.
    pub cpu: String,
    pub threads: usize,
    /// Says how much memory is free at the moment.
    pub free_bytes: fn() -> Option<usize>,
}

/// On whose hardware it was measured: elsewhere it says nothing.
#[derive(Serialize, Deserialize)]
struct Kept {
    cpu: String,
    threads: usize,
    measured: Measured,
}

/// Takes what was kept in `file` for this CPU and these threads, or measures as soon as no model loads
/// or runs, and keeps it. Where that would take much of the memory that is free, nothing is measured.
pub(crate) async fn measure_when_idle(app: Arc<App>, file: PathBuf, host: Host) {
    let Host { cpu, threads, free_bytes } = host;
    if let Some(measured) = kept(&file, &cpu, threads) {
        let _ = app.measured.set(measured);
        return;
    }
    loop {
        tokio::select! {
            () = tokio::time::sleep(IDLE_WAIT) => {}
            () = app.drain.cancelled() => return,
        }
        let replicas = app.registry.replica_records();
        let busy = replicas
            .iter()
            .any(|r| r.state == ReplicaState::Loading || r.running > 0 || r.waiting > 0);
        if !busy {
            break;
        }
    }
    let needed = memory_bytes(threads);
    if free_bytes().is_none_or(|free| needed > free / FREE_SHARE) {
        tracing::info!(
            needed,
            "too little memory is free to measure this host: its record says nothing of it"
        );
        return;
    }
    let measuring = tokio::task::spawn_blocking(move || {
        let peaks = measure(&ThreadPool::new(threads), Isa::detect(), MEASURE_TIME);
        Measured {
            memory_bytes_per_s: peaks.memory_bytes_per_second as u64,
            int8_ops_per_s: peaks.int8_ops.unwrap_or_default() as u64,
        }
    });
    let Ok(measured) = measuring.await else { return };
    tracing::debug!(?measured, "this host is measured");
    let _ = app.measured.set(measured);
    let text = serde_json::to_string_pretty(&Kept { cpu, threads, measured }).unwrap_or_default();
    if let Err(error) = std::fs::write(&file, text) {
        tracing::warn!(%error, file = %file.display(), "what was measured of this host is not kept");
    }
}

/// A file that cannot be read, or is of another host, is as none: it is written anew.
fn kept(file: &Path, cpu: &str, threads: usize) -> Option<Measured> {
    let kept: Kept = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    (kept.cpu == cpu && kept.threads == threads).then_some(kept.measured)
}

/// Nodes of a few seconds, as in tests, are not measured; busy ones are looked at again after this.
const IDLE_WAIT: Duration = Duration::from_secs(10);
/// At most this part of the free memory is taken for it.
const FREE_SHARE: usize = 8;
/// For memory, f32 and int8 together.
const MEASURE_TIME: Duration = Duration::from_millis(300);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_belongs_to_one_host() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("measured.json");
        assert_eq!(kept(&file, "a", 2), None);
        let measured = Measured { memory_bytes_per_s: 12_000_000_000, int8_ops_per_s: 7 };
        let text = serde_json::to_string(&Kept { cpu: "a".to_owned(), threads: 2, measured });
        std::fs::write(&file, text.unwrap()).unwrap();
        assert_eq!(kept(&file, "a", 2), Some(measured));
        assert_eq!(kept(&file, "b", 2), None);
        assert_eq!(kept(&file, "a", 4), None);
        std::fs::write(&file, "{").unwrap();
        assert_eq!(kept(&file, "a", 2), None);
    }
}
