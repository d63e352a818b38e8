//! What `/metrics` says of membership, routing and records. Names and their labels are a closed set.

use protocol::Instant;
use protocol::membership::MembershipStats;
use scheduler::router::{Decisions, Router, Why};

use super::roster::Exchanges;
use crate::metrics::Sample;

pub(super) fn of_membership(stats: &MembershipStats) -> Vec<Sample> {
    let members = |state, n: usize| Sample::labelled("grapevine_members", "state", state, n as f64);
    let alive = stats.present.saturating_sub(stats.suspects);
    let mut samples = vec![
        members("alive", alive),
        members("suspect", stats.suspects),
        members("departed", stats.departed),
        Sample::new("grapevine_membership_health", f64::from(stats.health)),
    ];
    samples.extend(
        [
            ("grapevine_membership_probes_total", stats.probes),
            ("grapevine_membership_probes_failed_total", stats.probes_failed),
            ("grapevine_membership_deaths_total", stats.deaths),
            ("grapevine_membership_returns_total", stats.returns),
            ("grapevine_membership_refutations_total", stats.refutations),
            ("grapevine_membership_stalls_total", stats.stalls),
            ("grapevine_membership_syncs_total", stats.syncs),
            ("grapevine_membership_accusations_damped_total", stats.accusations_damped),
            ("grapevine_membership_malformed_total", stats.malformed),
        ]
        .map(|(name, value)| Sample::new(name, value as f64)),
    );
    let claims =
        |reason, n: u64| labelled("grapevine_membership_claims_refused_total", "reason", reason, n);
    samples.push(claims("jump", stats.jumps_refused));
    samples.push(claims("ghost", stats.ghosts_refused));
    let way = |name, way, n: u64| labelled(name, "direction", way, n);
    samples.push(way("grapevine_membership_datagrams_total", "in", stats.datagrams_in));
    samples.push(way("grapevine_membership_datagrams_total", "out", stats.datagrams_out));
    samples.push(way("grapevine_membership_bytes_total", "in", stats.bytes_in));
    samples.push(way("grapevine_membership_bytes_total", "out", stats.bytes_out));
    samples
}

pub(super) fn of_router(router: &Router, now: Instant) -> Vec<Sample> {
    let stats = router.stats();
    let chosen = |at, n| labelled("grapevine_router_choices_total", "node", at, n);
    let ended = |how, n| labelled("grapevine_router_attempts_lost_total", "outcome", how, n);
    vec![
        chosen("own", stats.chosen_own),
        chosen("peer", stats.chosen_peer),
        ended("refused", stats.refused),
        ended("failed", stats.failed),
        Sample::new("grapevine_router_unavailable_total", stats.unavailable as f64),
        Sample::new("grapevine_router_in_flight", router.in_flight_elsewhere() as f64),
        Sample::new("grapevine_router_breakers_open", router.breakers_open(now) as f64),
    ]
}

pub(super) fn of_decisions(decisions: &Decisions) -> Vec<Sample> {
    let stats = decisions.stats();
    let replica = |why: &Why| labelled_by_why(*why, stats.replicas[*why as usize]);
    let mut samples: Vec<Sample> = Why::ALL.iter().map(replica).collect();
    let prefill = |path, n| labelled("grapevine_router_prefills_total", "path", path, n);
    let regret = |why: Why, us| {
        let name = "grapevine_router_regret_seconds_total";
        Sample::labelled(name, "why", why.as_str(), seconds(us))
    };
    samples.extend([
        prefill("recompute", stats.recompute),
        prefill("fetch", stats.fetch),
        prefill("remote", stats.remote),
        Sample::new("grapevine_router_first_tokens_total", stats.first_tokens as f64),
        Sample::new("grapevine_router_estimate_error_seconds_total", seconds(stats.error_us)),
        Sample::new("grapevine_router_estimate_bias_seconds", stats.bias_us as f64 / 1e6),
        regret(Why::Cheapest, stats.regret_us),
        regret(Why::Explored, stats.regret_explored_us),
    ]);
    samples
}

fn labelled_by_why(why: Why, n: u64) -> Sample {
    labelled("grapevine_router_decisions_total", "why", why.as_str(), n)
}

fn seconds(us: u64) -> f64 {
    us as f64 / 1e6
}

pub(super) fn of_records(exchanges: &Exchanges, known: usize) -> Vec<Sample> {
    let count = |how, n| labelled("grapevine_record_exchanges_total", "outcome", how, n);
    vec![
        Sample::new("grapevine_node_records", known as f64),
        count("done", exchanges.done),
        count("failed", exchanges.failed),
    ]
}

fn labelled(name: &'static str, key: &'static str, label: &'static str, n: u64) -> Sample {
    Sample::labelled(name, key, label, n as f64)
}
