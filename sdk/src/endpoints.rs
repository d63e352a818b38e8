//! Which endpoint to ask, and when: time and chance arrive as arguments.
//!
//! Owns what is known of each endpoint. The one that answered last is asked again until it fails; an
//! endpoint that failed rests, longer each time, and comes after the others until it answers.

use std::time::{Duration, Instant};

use protocol::api::EndpointList;

use crate::base::Base;

/// Those that the client was given, and those that nodes told it.
#[derive(Debug)]
pub(crate) struct Endpoints {
    /// At least one: those that were given stay. At most [`ENDPOINTS_MAX`] more.
    all: Vec<Endpoint>,
}

#[derive(Debug)]
struct Endpoint {
    base: Base,
    /// The node behind it, once it is known.
    node: Option<String>,
    /// The user named it: it is never forgotten.
    given: bool,
    /// The last list had it. Others stay until they fail: who lists is perhaps cut off itself.
    told: bool,
    /// In a row.
    failures: u32,
    rests_until: Option<Instant>,
    /// It answered last.
    preferred: bool,
}

/// How an endpoint failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing listens at this address; the node may have others.
    Unreachable,
    /// It broke off, was silent, or answered with an error of its own.
    Broken,
    /// It has no room, or is not ready.
    Busy { retry_after: Option<Duration> },
}

impl Endpoints {
    /// `given` has at least one.
    pub fn new(given: Vec<Base>) -> Self {
        let mut endpoints = Endpoints { all: Vec::new() };
        for base in given {
            endpoints.add(base, None, true);
        }
        endpoints
    }

    /// The endpoint to ask next, none of `excluded`, and until when it rests; `None` if all are excluded.
    pub fn choose(&self, now: Instant, excluded: &[Base]) -> Option<(Base, Option<Instant>)> {
        let open = self.all.iter().filter(|e| !excluded.contains(&e.base));
        let rest = |e: &Endpoint| e.rests_until.filter(|until| *until > now);
        let best = open.min_by_key(|e| (rest(e), e.failures, !e.preferred))?;
        Some((best.base.clone(), rest(best)))
    }

    /// It answered.
    pub fn worked(&mut self, base: &Base) {
        for endpoint in &mut self.all {
            endpoint.preferred = endpoint.base == *base;
            if endpoint.preferred {
                (endpoint.failures, endpoint.rests_until) = (0, None);
            }
        }
    }

    /// It did not; it rests from `now` on. Addresses that lead to the same node rest, too, unless only
    /// this one leads nowhere. `random` spreads the clients of one node.
    pub fn failed(&mut self, base: &Base, now: Instant, fault: Fault, random: u64) {
        let Some(at) = self.all.iter().position(|e| e.base == *base) else { return };
        let node = match fault {
            Fault::Unreachable => None,
            Fault::Broken | Fault::Busy { .. } => self.all[at].node.clone(),
        };
        for (i, endpoint) in self.all.iter_mut().enumerate() {
            if i == at || (node.is_some() && endpoint.node == node) {
                endpoint.failures = endpoint.failures.saturating_add(1);
                endpoint.rests_until = Some(now + rest(endpoint.failures, fault, random));
            }
        }
        if fault == Fault::Unreachable && !self.all[at].given && !self.all[at].told {
            self.all.remove(at);
        }
    }

    /// What the node behind `by` says about itself and the others. A loopback address is taken only from
    /// who is on this host.
    pub fn tell(&mut self, by: &Base, list: EndpointList) {
        for endpoint in &mut self.all {
            endpoint.told = false;
            if endpoint.base == *by {
                endpoint.node = list.node.clone().or(endpoint.node.take());
            }
        }
        // The likeliest address of each node, then the second ones.
        let rounds = list.data.iter().map(|info| info.urls.len()).max().unwrap_or(0);
        for round in 0..rounds.min(URLS_OF_A_NODE_MAX) {
            for info in &list.data {
                let url = info.urls.get(round).and_then(|url| Base::parse(url).ok());
                let Some(base) = url.filter(|url| by.is_loopback() || !url.is_loopback()) else {
                    continue;
                };
                self.add(base, info.node.clone(), false);
            }
        }
    }

    fn add(&mut self, base: Base, node: Option<String>, given: bool) {
        if let Some(known) = self.all.iter_mut().find(|e| e.base == base) {
            known.told = true;
            known.node = node.or(known.node.take());
            return;
        }
        if !given && self.all.iter().filter(|e| !e.given).count() >= ENDPOINTS_MAX {
            return;
        }
        let (failures, rests_until, preferred) = (0, None, false);
        self.all.push(Endpoint { base, node, given, told: true, failures, rests_until, preferred });
    }

    /// Base URLs, in the order in which they are asked.
    pub fn bases(&self, now: Instant) -> Vec<Base> {
        let mut all: Vec<&Endpoint> = self.all.iter().collect();
        let rest = |e: &Endpoint| e.rests_until.filter(|until| *until > now);
        all.sort_by_key(|e| (rest(e), e.failures, !e.preferred));
        all.into_iter().map(|e| e.base.clone()).collect()
    }
}

/// How long an endpoint rests after its n-th failure in a row: 2^(n-1) times [`REST_MIN`], at most
/// [`REST_MAX`], between half and all of it; or what the node asks for, at most [`RETRY_AFTER_MAX`], and
/// up to a quarter more.
fn rest(failures: u32, fault: Fault, random: u64) -> Duration {
    let share = (random >> 11) as f64 / (1u64 << 53) as f64;
    let backoff = REST_MIN.saturating_mul(1 << (failures.saturating_sub(1)).min(16)).min(REST_MAX);
    match fault {
        Fault::Busy { retry_after: Some(asked) } => {
            asked.min(RETRY_AFTER_MAX).mul_f64(1.0 + share / 4.0)
        }
        _ => backoff.mul_f64(0.5 + share / 2.0),
    }
}

/// Too small: clients storm a node that starts. Too large: they see a pause that nobody needed.
const REST_MIN: Duration = Duration::from_millis(100);
const REST_MAX: Duration = Duration::from_secs(5);
/// Most that a node can make its clients wait.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);
/// Endpoints learnt; more are not taken.
const ENDPOINTS_MAX: usize = 256;
/// Addresses taken of each node.
const URLS_OF_A_NODE_MAX: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::api::EndpointInfo;

    fn base(port: u16) -> Base {
        Base::parse(&format!("http://10.0.0.1:{port}")).unwrap()
    }

    fn list(node: &str, nodes: &[(&str, &[&str])]) -> EndpointList {
        let info = |(node, urls): &(&str, &[&str])| EndpointInfo {
            object: "endpoint".to_owned(),
            node: Some((*node).to_owned()),
            name: String::new(),
            urls: urls.iter().map(|url| (*url).to_owned()).collect(),
        };
        let data = nodes.iter().map(info).collect();
        EndpointList { object: "list".to_owned(), node: Some(node.to_owned()), data }
    }

    fn order(endpoints: &Endpoints, now: Instant) -> Vec<String> {
        endpoints.bases(now).iter().map(|b| b.as_str()["http://".len()..].to_owned()).collect()
    }

    #[test]
    fn who_answered_is_asked_again_and_who_failed_rests() {
        let now = Instant::now();
        let mut all = Endpoints::new(vec![base(1), base(2), base(3), base(1)]);
        assert_eq!(order(&all, now), ["10.0.0.1:1", "10.0.0.1:2", "10.0.0.1:3"]);
        all.worked(&base(2));
        assert_eq!(all.choose(now, &[]).unwrap(), (base(2), None));
        assert_eq!(all.choose(now, &[base(2)]).unwrap(), (base(1), None));
        all.failed(&base(2), now, Fault::Broken, u64::MAX);
        assert_eq!(all.choose(now, &[]).unwrap(), (base(1), None));
        all.failed(&base(1), now, Fault::Unreachable, u64::MAX);
        all.failed(&base(3), now, Fault::Busy { retry_after: Some(Duration::from_secs(9)) }, 0);
        // All rest: the first to be rested is waited for.
        let (chosen, until) = all.choose(now, &[]).unwrap();
        assert!(chosen == base(2) && until.unwrap() - now <= REST_MIN, "{until:?}");
        let (chosen, until) = all.choose(now, &[base(1), base(2)]).unwrap();
        assert_eq!((chosen, until.unwrap() - now), (base(3), Duration::from_secs(9)));
        assert_eq!(all.choose(now, &[base(1), base(2), base(3)]), None);
        let later = now + Duration::from_secs(1);
        assert_eq!(all.choose(later, &[]).unwrap(), (base(2), None), "the last that worked");
    }

    #[test]
    fn rests_grow_to_a_bound_and_differ() {
        let ms = |failures, random| rest(failures, Fault::Broken, random).as_millis();
        assert_eq!([ms(1, 0), ms(2, 0), ms(3, 0), ms(99, 0)], [50, 100, 200, 2500]);
        assert_eq!([ms(1, 1 << 63), ms(7, 1 << 63), ms(u32::MAX, 1 << 63)], [75, 3750, 3750]);
        let asked = |s| Fault::Busy { retry_after: Some(Duration::from_secs(s)) };
        assert_eq!(rest(1, asked(3600), 0), RETRY_AFTER_MAX);
        assert_eq!(rest(5, asked(4), 1 << 63), Duration::from_millis(4500));
        assert_eq!(rest(1, Fault::Busy { retry_after: None }, 0), REST_MIN / 2);
    }

    #[test]
    fn nodes_tell_of_each_other() {
        let now = Instant::now();
        let mut all = Endpoints::new(vec![base(1)]);
        let (one, two) = ("http://10.0.0.1:1/v1", "http://10.0.0.2:1/v1");
        let local = "http://127.0.0.1:9/v1";
        all.tell(&base(1), list("a", &[("a", &[one]), ("b", &[two, "http://[fd00::2]:1/v1"])]));
        assert_eq!(order(&all, now), ["10.0.0.1:1", "10.0.0.2:1", "[fd00::2]:1"]);
        // Loopback is another host's, https is nobody's.
        all.tell(&base(1), list("a", &[("c", &[local, "https://10.0.0.3:1"])]));
        assert_eq!(order(&all, now).len(), 3);
        let mut here = Endpoints::new(vec![Base::parse("http://localhost:1").unwrap()]);
        here.tell(&Base::parse("http://localhost:1").unwrap(), list("a", &[("c", &[local])]));
        assert_eq!(order(&here, now), ["localhost:1", "127.0.0.1:9"]);
        // A node that is silent is silent at all its addresses.
        all.tell(&base(1), list("a", &[("b", &[two, "http://[fd00::2]:1/v1"])]));
        all.failed(&Base::parse(two).unwrap(), now, Fault::Broken, 0);
        assert_eq!(all.choose(now, &[base(1)]).unwrap().1, Some(now + REST_MIN / 2));
        // An address that leads nowhere says nothing of the others, and is forgotten when untold.
        all.tell(&base(1), list("a", &[]));
        all.failed(&Base::parse(two).unwrap(), now, Fault::Unreachable, 0);
        assert_eq!(order(&all, now), ["10.0.0.1:1", "[fd00::2]:1"]);
        all.failed(&base(1), now, Fault::Unreachable, 0);
        assert_eq!(order(&all, now).len(), 2, "what was given stays");
    }

    #[test]
    fn lists_are_bounded() {
        let mut all = Endpoints::new(vec![base(1)]);
        let urls: Vec<String> = (2..2000).map(|port| format!("http://10.0.0.2:{port}")).collect();
        let nodes: Vec<[&str; 1]> = urls.iter().map(|url| [url.as_str()]).collect();
        let nodes: Vec<(&str, &[&str])> = nodes.iter().map(|urls| ("x", &urls[..])).collect();
        all.tell(&base(1), list("a", &nodes));
        assert_eq!(all.all.len(), 1 + ENDPOINTS_MAX);
        let many: Vec<&str> = urls.iter().map(String::as_str).collect();
        let mut all = Endpoints::new(vec![base(1)]);
        all.tell(&base(1), list("a", &[("x", &many)]));
        assert_eq!(all.all.len(), 1 + URLS_OF_A_NODE_MAX);
    }
}
