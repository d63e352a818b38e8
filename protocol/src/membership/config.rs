//! What an operator may tune, and what each choice costs.

use crate::Duration;

/// Configuration of a [`Membership`](super::Membership). The defaults meet the goals of
/// docs/membership-report.md on links of 4 to 100 ms round trip with up to 5 % loss.
#[derive(Clone, Debug, PartialEq)]
pub struct MembershipConfig {
    /// Unit: time between two probes that this node starts; multiplied by its health. Every second one
    /// goes to its neighbour on the ring, so a crash is first noticed after `0.74 x probe_interval` on
    /// average, `1.95 x` at p99. Too small: an idle node sends `2 x 37 bytes / probe_interval`, and over
    /// QUIC `190 bytes / probe_interval`. Too large: crashes stay unseen. Default 500 ms.
    pub probe_interval: Duration,
    /// Unit: pings to the target before it is suspected, at most 4. From the second one on, each goes
    /// with `indirect_probes` pings through others. A healthy member is suspected with probability
    /// `p^attempts x q^(indirect_probes x (attempts - 1))`, where `p` is the loss of a round trip and
    /// `q` that of two. Too small: in a large mesh with loss, suspicions and their refutations grow
    /// with the number of members and fill the links. Too large: each attempt adds a timeout to the
    /// detection of a crash. Default 3.
    pub probe_attempts: u8,
    /// Unit: members asked to ping the target, for each attempt but the first. Too small: one bad
    /// link looks like a crash. Too large: `4 x` as many datagrams for each lost one. Default 3.
    pub indirect_probes: usize,
    /// Unit: round trip assumed before one was measured. Too small: first probes are repeated for
    /// nothing. Too large: the first crashes are seen later. Default 60 ms.
    pub rtt_initial: Duration,
    /// Unit: least time for one attempt. An attempt waits `1.5 x` the largest recent round trip to the
    /// member plus half of this. Too small: a scheduling delay of the host counts as loss. Too large:
    /// detection takes `probe_attempts + 1` times as much longer. Default 50 ms.
    pub probe_timeout_min: Duration,
    /// Unit: most time for one attempt on a direct path of a healthy node. Too small: members behind
    /// slow links are suspected. Too large: one slow answer delays detection. Default 1 s.
    pub probe_timeout_max: Duration,
    /// Formula: a suspect is dead after at least `k x max(1, log10(members)) x probe_interval`. Too
    /// small: a refutation comes too late and a healthy member is evicted. Too large: crashed members
    /// stay. Default 1.2, thus 1.2 s at 100 members.
    pub suspicion_factor: f64,
    /// Formula: without confirmations the time is this many times the least one. Too small: one
    /// accuser with a bad link evicts a healthy member. Too large: a crash that few can see takes
    /// long. Default 6.
    pub suspicion_max_factor: f64,
    /// Unit: accusers beyond the first that bring the suspicion time down to the least, at most 3.
    /// Too small: two stalled members evict a healthy one. Too large: crashes are seen later.
    /// Default 3.
    pub confirmations_expected: usize,
    /// Unit: members told at once when this node suspects one, so that they check it themselves. Too
    /// small: confirmations wait for chance. Too large: a burst of probes at a member that may only be
    /// slow. Default 4.
    pub alarm_fanout: usize,
    /// Unit: members that fresh news go to at once. A share of about `e^-gossip_fanout` of the members is
    /// missed by all and hears them with probes only. Too small: that share is large, and waits several
    /// `probe_interval`. Too large: the mesh pays `members x gossip_fanout` datagrams for each piece of
    /// news. Default 5.
    pub gossip_fanout: usize,
    /// Unit: least time between two such bursts. Too small: a storm of news costs up to
    /// `gossip_fanout x 1,200 bytes / gossip_gap`. Too large: news wait. Default 50 ms.
    pub gossip_gap: Duration,
    /// Formula: each piece of news is sent `resend_factor x ceil(log10(members + 1))` times. Too small:
    /// some members learn it only by anti-entropy. Too large: bytes for what all know. Default 4.
    pub resend_factor: u32,
    /// Unit: pieces of news waiting to be sent; beyond it the most-sent is dropped and left to
    /// anti-entropy. Too small: storms spread slowly. Too large: old news delay new ones. Default 4,096.
    pub news_max: usize,
    /// Unit: members remembered, departed ones included. Beyond it the longest departed is forgotten,
    /// and if none is, the newcomer is refused. Too small: members miss. Too large: about 100 bytes
    /// each. Default 32,768.
    pub members_max: usize,
    /// Unit: time between two comparisons of views with a random member, when nothing differs. Too
    /// small: 40 bytes each. Too large: lost news stay lost for longer. Default 5 s.
    pub sync_interval: Duration,
    /// Unit: time between them while views differ. Too small: the same entries are sent by several.
    /// Too large: joins and heals take long. Default 250 ms.
    pub sync_hungry_interval: Duration,
    /// Unit: datagrams of entries that one comparison may cost each side. Too small: a join takes many
    /// rounds. Too large: a burst that overruns the receiver's buffer. Default 24.
    pub sync_datagrams_max: usize,
    /// Unit: datagrams of anti-entropy a second, with as many in one burst. Too small: joins of
    /// thousands take long. Too large: they fill the links. Default 400.
    pub sync_datagrams_per_s_max: u32,
    /// Unit: time between two attempts to reach a member held for dead (a random one each time). A
    /// healed partition is noticed after about `reconnect_interval / members of the smaller side`. Too
    /// small: bytes for members that never return. Too large: heals wait. Default 2 s.
    pub reconnect_interval: Duration,
    /// Unit: departed members that others say are back, and that this node pings itself, a second.
    /// After a partition heals, this takes `members of the other side / verifications_per_s_max`. Too
    /// small: that is long. Too large: a burst of pings to one returned member from all. Default 200.
    pub verifications_per_s_max: u32,
    /// Unit: time a departed member is remembered and tried again. Too small: a node cut off for longer
    /// brings ghosts. Too large: memory, and attempts to reach what is gone. Default 24 h.
    pub departed_retention: Duration,
    /// Unit: how late a timer must come for this node to know that it was stalled itself. Judgements
    /// that fell into the stall are then void. Too small: it forgives everyone all the time. Too large:
    /// a stalled node accuses healthy ones. Default 200 ms.
    pub stall_threshold: Duration,
}

/// Why a configuration cannot work. Nothing has been built.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{name} is {value}, must be between {min} and {max}")]
pub struct MembershipConfigError {
    pub name: &'static str,
    pub value: f64,
    pub min: f64,
    pub max: f64,
}

impl Default for MembershipConfig {
    fn default() -> Self {
        MembershipConfig {
            probe_interval: Duration::from_millis(500),
            probe_attempts: 3,
            indirect_probes: 3,
            rtt_initial: Duration::from_millis(60),
            probe_timeout_min: Duration::from_millis(50),
            probe_timeout_max: Duration::from_secs(1),
            suspicion_factor: 1.2,
            suspicion_max_factor: 6.0,
            confirmations_expected: 3,
            alarm_fanout: 4,
            gossip_fanout: 5,
            gossip_gap: Duration::from_millis(50),
            resend_factor: 4,
            news_max: 4096,
            members_max: 32_768,
            sync_interval: Duration::from_secs(5),
            sync_hungry_interval: Duration::from_millis(250),
            sync_datagrams_max: 24,
            sync_datagrams_per_s_max: 400,
            reconnect_interval: Duration::from_secs(2),
            verifications_per_s_max: 200,
            departed_retention: Duration::from_secs(24 * 3600),
            stall_threshold: Duration::from_millis(200),
        }
    }
}

impl MembershipConfig {
    /// Refuses what cannot work.
    pub fn validate(&self) -> Result<(), MembershipConfigError> {
        let seconds = |d: Duration| d.as_secs_f64();
        for (name, value, min, max) in [
            ("probe_interval_s", seconds(self.probe_interval), 0.01, 60.0),
            ("probe_attempts", f64::from(self.probe_attempts), 1.0, ATTEMPTS_LIMIT as f64),
            ("indirect_probes", self.indirect_probes as f64, 0.0, 16.0),
            ("rtt_initial_s", seconds(self.rtt_initial), 0.0, 10.0),
            ("probe_timeout_min_s", seconds(self.probe_timeout_min), 0.001, 10.0),
            ("probe_timeout_max_s", seconds(self.probe_timeout_max), 0.001, 60.0),
            ("suspicion_factor", self.suspicion_factor, 0.1, 100.0),
            ("suspicion_max_factor", self.suspicion_max_factor, 1.0, 100.0),
            ("confirmations_expected", self.confirmations_expected as f64, 0.0, 3.0),
            ("alarm_fanout", self.alarm_fanout as f64, 0.0, 16.0),
            ("gossip_fanout", self.gossip_fanout as f64, 0.0, 16.0),
            ("gossip_gap_s", seconds(self.gossip_gap), 0.001, 60.0),
            ("resend_factor", f64::from(self.resend_factor), 1.0, 40.0),
            ("news_max", self.news_max as f64, 16.0, LIMIT),
            ("members_max", self.members_max as f64, 2.0, LIMIT),
            ("sync_interval_s", seconds(self.sync_interval), 0.01, 3600.0),
            ("sync_hungry_interval_s", seconds(self.sync_hungry_interval), 0.01, 3600.0),
            ("sync_datagrams_max", self.sync_datagrams_max as f64, 1.0, 1024.0),
            ("sync_datagrams_per_s_max", f64::from(self.sync_datagrams_per_s_max), 1.0, LIMIT),
            ("reconnect_interval_s", seconds(self.reconnect_interval), 0.01, 3600.0),
            ("verifications_per_s_max", f64::from(self.verifications_per_s_max), 20.0, LIMIT),
            ("departed_retention_s", seconds(self.departed_retention), 60.0, 1e9),
            ("stall_threshold_s", seconds(self.stall_threshold), 0.01, 60.0),
        ] {
            if !(min..=max).contains(&value) {
                return Err(MembershipConfigError { name, value, min, max });
            }
        }
        Ok(())
    }

    /// Least time from suspicion to death in a mesh of `members`.
    pub fn suspicion_min(&self, members: usize) -> Duration {
        let scale = (members.max(1) as f64).log10().max(1.0);
        self.probe_interval.mul_f64(self.suspicion_factor * scale)
    }

    /// Time from suspicion to death with that many confirmations beyond the first accuser
    /// (Lifeguard, Dadgar et al. 2018, section IV-B).
    pub fn suspicion_time(&self, members: usize, confirmations: usize) -> Duration {
        let min = self.suspicion_min(members);
        // The suspect cannot accuse itself, and the first accuser has spoken.
        let expected = self.confirmations_expected.min(members.saturating_sub(2));
        if confirmations >= expected {
            return min;
        }
        let max = min.mul_f64(self.suspicion_max_factor);
        let share = ((confirmations + 1) as f64).ln() / ((expected + 1) as f64).ln();
        max - (max - min).mul_f64(share)
    }

    /// How often one piece of news is sent in a mesh of `members`.
    pub(super) fn sends_max(&self, members: usize) -> u8 {
        let digits = ((members + 1) as f64).log10().ceil().max(1.0) as u32;
        u8::try_from(self.resend_factor * digits).unwrap_or(u8::MAX)
    }
}

/// Pings of one probe.
pub(super) const ATTEMPTS_LIMIT: usize = 4;
const LIMIT: f64 = 1_048_576.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suspicion_shrinks_with_confirmations_and_grows_with_members() {
        let config = MembershipConfig {
            probe_interval: Duration::from_millis(200),
            suspicion_factor: 5.0,
            ..Default::default()
        };
        let ms = |members, c| config.suspicion_time(members, c).as_millis();
        assert_eq!([ms(100, 0), ms(100, 1), ms(100, 2), ms(100, 3)], [12000, 7000, 4075, 2000]);
        assert_eq!([ms(5, 3), ms(10, 3), ms(1000, 3), ms(10_000, 3)], [1000, 1000, 3000, 4000]);
        // Two members: nobody can confirm. Three: one can.
        assert_eq!([ms(2, 0), ms(3, 0), ms(3, 1)], [1000, 6000, 1000]);
    }

    #[test]
    fn refuses_what_cannot_work() {
        assert_eq!(MembershipConfig::default().validate(), Ok(()));
        let config = MembershipConfig { probe_attempts: 9, ..Default::default() };
        let error = config.validate().unwrap_err().to_string();
        assert_eq!(error, "probe_attempts is 9, must be between 1 and 4");
        let config = MembershipConfig { suspicion_factor: f64::NAN, ..Default::default() };
        assert_eq!(config.validate().unwrap_err().name, "suspicion_factor");
    }
}
