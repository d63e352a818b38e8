//! The goals of docs/membership-report.md, at sizes that a test can afford.

use protocol::membership::MembershipConfig;
use sim::measure::{Foca, Ours, bandwidth, detection, join, lossy, stalls};

#[test]
fn crashes_are_known_in_time() {
    let times = detection(&Ours::default(), 7, 100, 8, &mut |_| ());
    assert_eq!(times.len(), 8);
    let slowest = times.quantile(1.0).expect("known by all");
    assert!(slowest <= 3.0, "{slowest} s");
    // The baseline lives in the same world and sees crashes, too.
    let times = detection(&Foca, 7, 50, 4, &mut |_| ());
    assert!(times.quantile(1.0).is_some_and(|slowest| slowest < 6.0), "{times:?}");
}

#[test]
fn bytes_stay_few_and_flat() {
    // What QUIC adds is part of it.
    let mean = |nodes, loss| bandwidth(&Ours::default(), 7, nodes, loss, 10).quic_mean;
    let (few, many) = (mean(50, 0.0), mean(200, 0.0));
    assert!(many <= 500.0 && many < few * 1.1, "{few} and {many} bytes/s at rest");
    let (few, many) = (mean(50, 0.05), mean(200, 0.05));
    assert!(many <= 3000.0 && many < few * 1.2, "{few} and {many} bytes/s at 5 % loss");
}

#[test]
fn healthy_nodes_stay() {
    let evictions = stalls(&Ours::default(), 7, 100, 3.0);
    assert!(evictions.healthy == 0, "{evictions:?}");
    assert!(evictions.stalled > 10, "stalls happened: {evictions:?}");
    let evictions = lossy(&MembershipConfig::default(), 7, 100, 0.05, 30_000, &mut |_| ());
    assert!(evictions.healthy == 0 && evictions.probes >= 30_000, "{evictions:?}");
}

#[test]
fn hundreds_join_within_seconds() {
    let (done, most) = join(&Ours::default(), 7, 400, 10, &mut |_| ());
    assert!(done.is_some_and(|seconds| seconds < 8.0), "{done:?}");
    assert!(most < 5_000_000, "{most} bytes");
}
