use super::*;

/// A reporter, and the owner's answers in a few words.
struct Told {
    machine: Reporter,
    now: u64,
    calls: Vec<(NodeId, CallId, Report)>,
}

/// A report in its parts: call, number of the first event, events, piece and sum.
type Said = (CallId, u64, Vec<(u64, bool)>, Option<Piece>, Option<Sum>);

impl Told {
    /// It serves [`MODEL`] in a mesh of one, itself the owner.
    fn new(config: ReporterConfig) -> Self {
        let mut told = Told { machine: Reporter::new(config, 1), now: 0, calls: Vec::new() };
        told.give(ReporterInput::Members(nodes(0..1)));
        told.give(ReporterInput::Serve { identity: MODEL });
        told
    }

    fn give(&mut self, input: ReporterInput) {
        let mut out = Vec::new();
        self.machine.handle(at(self.now), input, &mut out);
        let calls = out.into_iter().map(|ReporterOutput::Tell { owner, call, report }| {
            // What is said can be said on the wire.
            assert_eq!(Report::from_bytes(&report.to_bytes()), Ok(report.clone()));
            (owner, call, report)
        });
        self.calls.extend(calls);
        let due = self.machine.next_deadline();
        assert!(due.is_none_or(|due| due > at(self.now)), "nothing is due after an input");
    }

    fn store(&mut self, list: &[u64]) {
        self.give(ReporterInput::Stored { identity: MODEL, first: name(0), names: names(list) });
    }

    fn remove(&mut self, list: &[u64]) {
        self.give(ReporterInput::Removed { identity: MODEL, names: names(list) });
    }

    /// The only report since last asked.
    #[track_caller]
    fn call(&mut self) -> (CallId, Report) {
        assert_eq!(self.calls.len(), 1, "{:?}", self.calls);
        let (_, call, report) = self.calls.remove(0);
        (call, report)
    }

    #[track_caller]
    fn news(&mut self) -> Said {
        let (call, report) = self.call();
        let News::Blocks { first, events, piece, sum } = report.news else { panic!("gone") };
        (call, first, events.iter().map(|(n, removed)| (n.number(), removed)).collect(), piece, sum)
    }

    fn answer(&mut self, call: CallId, heard: Heard) {
        self.give(ReporterInput::Answered { call, heard });
    }

    /// Lets time pass up to the next timer; says how much.
    fn wait(&mut self) -> u64 {
        let due =
            self.machine.next_deadline().expect("something is due").as_nanos() / 1_000_000 + 1;
        let waited = due - self.now;
        self.now = due;
        self.give(ReporterInput::Timer);
        waited
    }

    /// The first word, taken.
    #[track_caller]
    fn begun(mut self) -> Self {
        let (call, first, events, piece, sum) = self.news();
        assert_eq!((first, events.len(), piece, sum), (0, 0, all(&[]), Some(Sum::default())));
        self.answer(call, known(0));
        assert!(self.calls.is_empty());
        self
    }
}

#[test]
fn events_wait_for_others() {
    let mut told = Told::new(ReporterConfig::default()).begun();
    told.store(&[1, 2]);
    told.now += 50;
    told.remove(&[1, 9]);
    told.store(&[2, 1]);
    assert!(told.calls.is_empty());
    assert_eq!(told.wait(), 51);
    let (call, first, events, piece, sum) = told.news();
    assert_eq!(events, [(1, false), (2, false), (1, true), (1, false)]);
    assert_eq!((first, piece, sum), (0, None, None));
    // One report at a time.
    told.store(&[3]);
    assert!(told.calls.is_empty());
    told.answer(call, known(4));
    assert_eq!(told.wait(), 101);
    let (call, first, events, ..) = told.news();
    assert_eq!((first, events), (4, vec![(3, false)]));
    told.answer(call, known(5));
    // Many do not wait.
    told.store(&(100..611).collect::<Vec<_>>());
    assert!(told.calls.is_empty());
    told.store(&[611]);
    let (call, first, events, ..) = told.news();
    assert_eq!((first, events.len()), (5, 512));
    told.answer(call, known(517));
    // Nothing new is said now and then, with the sum.
    told.wait();
    let (call, first, events, piece, sum) = told.news();
    assert_eq!((first, events.len(), piece.is_none()), (517, 0, true));
    assert_eq!(sum.map(|sum| sum.names), Some(515));
    told.answer(call, known(517));
    assert!((5_000..15_002).contains(&told.wait()));
    told.call();
    let ReporterStats { names, links, reports, events, .. } = told.machine.stats();
    assert_eq!((names, links, reports, events), (515, 1, 6, 517));
}

#[test]
fn the_owner_says_what_comes_next() {
    let mut told = Told::new(ReporterConfig::default()).begun();
    told.store(&[1, 2, 3]);
    told.wait();
    let (call, ..) = told.news();
    // Only the first was taken: all the others again, after the wait for others.
    told.answer(call, known(1));
    told.wait();
    let (call, first, events, ..) = told.news();
    assert_eq!((first, events), (1, vec![(2, false), (3, false)]));
    // No answer: the same again. It may have been taken, with what has come since.
    told.give(ReporterInput::Failed { call });
    told.store(&[4]);
    assert!(told.calls.is_empty());
    told.wait();
    let (call, first, events, ..) = told.news();
    assert_eq!((first, events.len()), (1, 3));
    told.answer(call, known(4));
    told.store(&[5]);
    told.wait();
    let (call, ..) = told.news();
    // The owner has been started anew.
    told.answer(call, Heard::Unknown);
    let (call, first, events, piece, sum_) = told.news();
    assert_eq!((first, events.len(), piece), (5, 0, all(&[1, 2, 3, 4, 5])));
    assert_eq!(sum_, Some(sum(&[1, 2, 3, 4, 5])));
    told.answer(call, known(5));
    // Late answers of calls that are over.
    told.answer(CallId(1), Heard::Unknown);
    told.give(ReporterInput::Failed { call: CallId(2) });
    assert!(told.calls.is_empty());
}

#[test]
fn all_is_said_in_pieces_with_events_between() {
    let config = ReporterConfig { piece_names: 2, ..ReporterConfig::default() };
    let mut told = Told::new(config);
    let (call, ..) = told.call();
    told.store(&[10, 20, 30, 40, 50]);
    told.answer(call, Heard::Unknown);
    let (call, first, events, piece_, sum_) = told.news();
    assert_eq!((first, events.len(), piece_), (5, 0, piece(0, 20, &[10, 20])));
    assert_eq!(sum_, None);
    told.remove(&[20, 40]);
    told.answer(call, missing(5, 21));
    let (call, first, events, piece_, _) = told.news();
    assert_eq!((first, events), (5, vec![(20, true), (40, true)]));
    assert_eq!(piece_, piece(21, 50, &[30, 50]));
    // The answer is lost.
    told.give(ReporterInput::Failed { call });
    told.store(&[60]);
    told.wait();
    let (call, first, events, piece_, _) = told.news();
    assert_eq!((first, events.len(), piece_), (5, 3, piece(21, 50, &[30, 50])));
    // The piece was taken before, without the last event.
    told.answer(call, missing(8, 51));
    let (call, first, events, piece_, sum_) = told.news();
    assert_eq!((first, events.len(), piece_), (8, 0, piece(51, u64::MAX, &[60])));
    assert_eq!(sum_, Some(sum(&[10, 30, 50, 60])));
    told.answer(call, known(8));
    assert!(told.calls.is_empty());
    assert_eq!(told.machine.stats().links_well, 1);
}

#[test]
fn events_beyond_the_bound_are_said_as_all() {
    let config = ReporterConfig { events_max: 4, ..ReporterConfig::default() };
    let mut told = Told::new(config).begun();
    told.store(&[1]);
    told.wait();
    let (call, ..) = told.news();
    told.store(&[2, 3, 4, 5, 6]);
    told.answer(call, known(1));
    told.wait();
    let (call, first, events, piece, _) = told.news();
    assert_eq!((first, events.len(), piece), (6, 0, all(&[1, 2, 3, 4, 5, 6])));
    told.answer(call, known(6));
    assert!(told.calls.is_empty());
}

#[test]
fn names_are_bounded() {
    let config = ReporterConfig { names_max: 3, ..ReporterConfig::default() };
    let mut told = Told::new(config).begun();
    told.store(&[1, 2, 3, 4, 1]);
    told.remove(&[4, 2]);
    told.store(&[5]);
    told.wait();
    let (_, _, events, ..) = told.news();
    assert_eq!(events, [(1, false), (2, false), (3, false), (2, true), (5, false)]);
    assert_eq!((told.machine.stats().names, told.machine.stats().beyond), (3, 1));
}

/// An owner that says nonsense, or nothing, is not shouted at.
#[test]
fn patience_grows() {
    let answers: [&dyn Fn(u64) -> Option<Heard>; 7] = [
        &|_| None,
        &|_| Some(Heard::Unknown),
        &|_| Some(Heard::Known { next: u64::MAX, missing: None }),
        &|_| Some(missing(0, 0)),
        &|n| Some(known(n % 2)),
        &|n| Some(Heard::Known { next: 9, missing: Some(name(n)) }),
        &|_| Some(Heard::Busy { retry_ms: 0 }),
    ];
    for (number, answer) in answers.iter().enumerate() {
        let mut told = Told::new(ReporterConfig::default());
        told.store(&(0..3000).collect::<Vec<_>>());
        let mut reports = 0;
        while told.now < 60_000 {
            for (_, call, _) in std::mem::take(&mut told.calls) {
                reports += 1;
                match answer(reports) {
                    Some(heard) => told.answer(call, heard),
                    None => told.give(ReporterInput::Failed { call }),
                }
            }
            if told.calls.is_empty() {
                told.wait();
            }
        }
        let most = if number == 6 { 60_000 / 250 + 1 } else { 30 };
        assert!((5..=most).contains(&reports), "{number}: {reports} reports in a minute");
    }
    // Nobody can send it away for ever.
    let mut told = Told::new(ReporterConfig::default());
    let (call, _) = told.call();
    told.answer(call, Heard::Busy { retry_ms: u32::MAX });
    assert_eq!(told.wait(), 120_001);
}

#[test]
fn an_answer_that_never_comes_is_given_up() {
    let mut told = Told::new(ReporterConfig::default());
    let (call, _) = told.call();
    assert_eq!(told.wait(), 2_001);
    assert!(told.calls.is_empty());
    assert!((100..400).contains(&told.wait()));
    let (next, _) = told.call();
    told.answer(call, Heard::Busy { retry_ms: 60_000 });
    told.answer(next, known(0));
    assert_eq!(told.machine.stats().links_well, 1);
}

#[test]
fn owners_follow_the_members() {
    let mut told = Told::new(ReporterConfig::default()).begun();
    told.store(&[1]);
    told.give(ReporterInput::Members(nodes(0..9)));
    let (part, owners) = told.machine.owners_of(MODEL, name(5));
    assert_eq!((part, owners.len()), (PART, 2));
    let mut asked: Vec<NodeId> = told.calls.iter().map(|call| call.0).collect();
    told.wait();
    asked.extend(told.calls.iter().map(|call| call.0));
    assert!(owners.iter().all(|owner| *owner == node(0) || asked.contains(owner)));
    // One dies: the other hears nothing new, the next in the order hears all.
    told.calls.clear();
    told.machine = Told::new(ReporterConfig::default()).machine;
    told.give(ReporterInput::Members(nodes(0..9)));
    for (_, call, _) in std::mem::take(&mut told.calls) {
        told.answer(call, known(0));
    }
    let left: Vec<NodeId> = nodes(0..9).into_iter().filter(|n| *n != owners[0]).collect();
    told.give(ReporterInput::Members(left));
    let (_, now_owners) = told.machine.owners_of(MODEL, name(5));
    assert_eq!(now_owners[0], owners[1]);
    assert_eq!(told.calls.iter().map(|c| c.0).collect::<Vec<_>>(), [now_owners[1]]);
    told.give(ReporterInput::Members(Vec::new()));
    assert_eq!((told.machine.stats().links, told.machine.next_deadline()), (0, None));
    told.store(&[1]);
}

#[test]
fn a_model_comes_and_goes() {
    let mut told = Told::new(ReporterConfig::default()).begun();
    told.give(ReporterInput::Serve { identity: MODEL });
    told.store(&[1]);
    told.give(ReporterInput::Unserve { identity: MODEL });
    let (call, report) = told.call();
    assert_eq!(report.news, News::Gone);
    told.answer(call, Heard::Unknown);
    told.store(&[2]);
    told.remove(&[1]);
    assert_eq!((told.calls.len(), told.machine.next_deadline()), (0, None));
    told.give(ReporterInput::Serve { identity: MODEL });
    let (_, again) = told.call();
    assert_ne!(again.epoch, report.epoch);
}

#[test]
fn a_sequence_belongs_to_the_shard_of_its_first_block() {
    let mut told = Told::new(ReporterConfig { shards: 4, ..ReporterConfig::default() });
    for (owner, call, report) in std::mem::take(&mut told.calls) {
        assert_eq!((owner, report.part.shards), (node(0), 4));
        told.answer(call, known(0));
    }
    let first = |n: u64| name(n << 62);
    for n in [1, 3] {
        let names = names(&[5 + n, 7 + n]);
        told.give(ReporterInput::Stored { identity: MODEL, first: first(n), names });
    }
    told.remove(&[6, 8]);
    told.wait();
    let mut seen: Vec<(u16, Vec<(u64, bool)>)> = Vec::new();
    for (_, _, report) in std::mem::take(&mut told.calls) {
        let News::Blocks { events, .. } = report.news else { panic!("gone") };
        let events = events.iter().map(|(n, removed)| (n.number(), removed)).collect();
        seen.push((report.part.shard, events));
    }
    let expected = [
        (1, vec![(6, false), (8, false), (6, true), (8, true)]),
        (3, vec![(8, false), (10, false)]),
    ];
    assert_eq!(seen, expected);
}
