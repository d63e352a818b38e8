use super::*;

fn owner(config: OwnerConfig) -> Owner {
    let mut owner = Owner::new(config, 1);
    owner.members(at(0), nodes(0..20));
    owner
}

/// Some nodes with some blocks.
fn filled(config: OwnerConfig) -> Owner {
    let mut owner = owner(config);
    for (n, blocks) in [(1, &[1, 2, 3][..]), (2, &[1, 2]), (3, &[2, 3])] {
        let heard = owner.told(at(0), node(n), report(9, 5, &[], all(blocks)));
        assert_eq!(heard, known(5));
    }
    owner
}

fn tick_until_done(owner: &mut Owner, now: Instant) {
    while owner.next_deadline().is_some_and(|due| due <= now) {
        owner.tick(now);
    }
}

#[test]
fn events_follow_their_numbers() {
    let mut owner = owner(OwnerConfig::default());
    let mut told = |report| owner.told(at(0), node(1), report);
    // Nothing is understood before a piece.
    assert_eq!(told(report(9, 0, &[(1, false)], None)), Heard::Unknown);
    assert_eq!(told(report(9, 7, &[], piece(3, 9, &[]))), Heard::Unknown);
    // The events before the first piece are in it.
    assert_eq!(told(report(9, 3, &[(8, false), (8, true)], piece(0, 4, &[1, 4]))), missing(5, 5));
    // Twice, late and with a gap.
    assert_eq!(told(report(9, 5, &[(2, false), (1, true)], None)), missing(7, 5));
    assert_eq!(told(report(9, 5, &[(2, false), (1, true)], None)), missing(7, 5));
    assert_eq!(told(report(9, 4, &[(8, true), (2, false)], None)), missing(7, 5));
    assert_eq!(told(report(9, 8, &[(3, false)], None)), missing(7, 5));
    assert_eq!(told(report(9, 6, &[(1, true), (3, false)], None)), missing(8, 5));
    // A piece of another place or another time.
    assert_eq!(told(report(9, 8, &[], piece(6, 9, &[6]))), missing(8, 5));
    assert_eq!(told(report(9, 7, &[], piece(5, 9, &[6]))), missing(8, 5));
    assert_eq!(told(report(9, 3, &[], piece(0, 9, &[6]))), missing(8, 5));
    // An event of a name that the next piece says again.
    assert_eq!(told(report(9, 8, &[(6, false)], piece(5, 9, &[6, 9]))), missing(9, 10));
    let end = summed(9, 9, &[], piece(10, u64::MAX, &[11]), Some(sum(&[2, 3, 4, 6, 9, 11])));
    assert_eq!(told(end), known(9));
    assert_eq!(owner.names_of(&PART, node(1)), Some(names(&[2, 3, 4, 6, 9, 11])));
    assert_eq!(owner.stats().unequal, 0);
}

#[test]
fn the_longest_beginning_is_found() {
    let mut owner = filled(OwnerConfig::default());
    assert_eq!(query(&mut owner, &[1, 2, 3]), [(node(1), 3), (node(2), 2)]);
    assert_eq!(query(&mut owner, &[2, 3])[2..], [(node(2), 1)]);
    assert_eq!(query(&mut owner, &[4, 2, 3]), []);
    let two = Query { part: PART, names: names(&[2]), holders_max: 2 };
    assert_eq!((owner.query(&two).nodes, owner.query(&two).holders.len()), (3, 2));
    // Equals take turns.
    let mut firsts = [0; 4];
    (0..300).for_each(|_| firsts[owner.query(&two).holders[0].node.0[0] as usize] += 1);
    assert!(firsts[1..].iter().all(|n| (70..130).contains(n)), "{firsts:?}");
    let other = Query { part: Part { shards: 2, ..PART }, ..two };
    assert_eq!(owner.query(&other), Default::default());
}

#[test]
fn another_epoch_begins_anew() {
    let mut owner = filled(OwnerConfig::default());
    let mut told = |report| owner.told(at(1), node(1), report);
    assert_eq!(told(report(8, 5, &[(4, false)], None)), Heard::Unknown);
    assert_eq!(told(report(8, 0, &[], all(&[5]))), known(0));
    // A late word of the first life.
    assert_eq!(told(report(9, 5, &[(4, false)], None)), Heard::Unknown);
    let gone = |epoch| Report { part: PART, epoch, news: News::Gone };
    assert_eq!(told(gone(9)), Heard::Unknown);
    assert_eq!(owner.names_of(&PART, node(1)), Some(names(&[5])));
    assert_eq!(owner.told(at(1), node(1), gone(8)), Heard::Unknown);
    assert_eq!(owner.names_of(&PART, node(1)), None);
    assert_eq!(query(&mut owner, &[5]), []);
}

#[test]
fn events_that_were_not_kept_begin_anew() {
    let mut owner = filled(OwnerConfig::default());
    assert_eq!(owner.told(at(1), node(1), report(9, 7, &[(4, false)], None)), known(5));
    assert_eq!(owner.told(at(1), node(1), report(9, 8, &[], all(&[4, 5]))), known(8));
    assert_eq!(owner.names_of(&PART, node(1)), Some(names(&[4, 5])));
    assert_eq!(query(&mut owner, &[1]), [(node(2), 1)]);
}

#[test]
fn who_leaves_or_is_silent_is_forgotten() {
    let mut owner = filled(OwnerConfig::default());
    let others: Vec<NodeId> = nodes(0..20).into_iter().filter(|n| *n != node(2)).collect();
    owner.members(at(1), others);
    assert_eq!(query(&mut owner, &[1, 2]), [(node(1), 2)]);
    // Its last word comes late.
    let late = owner.told(at(2), node(2), report(9, 5, &[], all(&[1])));
    assert!(matches!(late, Heard::Busy { .. }));
    assert_eq!(query(&mut owner, &[1, 2]), [(node(1), 2)]);
    assert_eq!(owner.told(at(40_000), node(3), report(9, 5, &[], None)), known(5));
    tick_until_done(&mut owner, at(44_000));
    assert_eq!(owner.stats().nodes, 2);
    tick_until_done(&mut owner, at(45_000));
    assert_eq!((query(&mut owner, &[1]).len(), query(&mut owner, &[2]).len()), (0, 1));
    // Nothing is left of them.
    tick_until_done(&mut owner, at(86_000));
    tick_until_done(&mut owner, at(88_000));
    let stats = owner.stats();
    assert_eq!((stats.parts, stats.nodes, stats.names), (0, 0, 0));
    assert_eq!(owner.next_deadline(), None);
}

#[test]
fn no_more_names_than_there_is_room_for() {
    let mut owner = filled(OwnerConfig { names_max: 6, ..OwnerConfig::default() });
    assert_eq!(owner.told(at(1), node(4), report(9, 0, &[], all(&[3, 4, 5]))), known(0));
    let full = owner.told(at(2), node(1), report(9, 5, &[(6, false), (7, false)], None));
    let Heard::Busy { retry_ms } = full else { panic!("{full:?}") };
    assert!((15_000..=45_000).contains(&retry_ms));
    // Who was sent away is not known in part; others are as they were.
    assert_eq!(owner.names_of(&PART, node(1)), None);
    assert_eq!(query(&mut owner, &[1, 2]), [(node(2), 2)]);
    assert_eq!((owner.stats().full, owner.stats().names), (1, 5));
}

#[test]
fn few_say_all_at_once() {
    let config = OwnerConfig { dumps_max: 2, ..OwnerConfig::default() };
    let mut owner = owner(config);
    let begin = || report(9, 0, &[], piece(0, 9, &[1]));
    assert_eq!(owner.told(at(0), node(1), begin()), missing(0, 10));
    assert_eq!(owner.told(at(0), node(2), begin()), missing(0, 10));
    assert!(matches!(owner.told(at(0), node(3), begin()), Heard::Busy { retry_ms: 100..=300 }));
    // One piece is always taken.
    assert_eq!(owner.told(at(0), node(4), report(9, 0, &[], all(&[1]))), known(0));
    assert_eq!(owner.told(at(100), node(2), report(9, 0, &[], piece(10, u64::MAX, &[]))), known(0));
    assert_eq!(owner.told(at(100), node(3), begin()), missing(0, 10));
    // Who falls silent in the midst of it loses its place.
    tick_until_done(&mut owner, at(5000));
    assert_eq!(owner.told(at(5000), node(5), begin()), missing(0, 10));
    assert_eq!(
        owner.told(at(5000), node(1), report(9, 0, &[], piece(10, 11, &[]))),
        Heard::Unknown
    );
    // Who has not said all is found by what it has said, and not counted.
    let asked = Query { part: PART, names: names(&[1]), holders_max: 9 };
    assert_eq!((owner.query(&asked).nodes, owner.query(&asked).holders.len()), (2, 4));
}

#[test]
fn parts_are_bounded() {
    let mut owner = owner(OwnerConfig { parts_max: 2, ..OwnerConfig::default() });
    let of = |identity| Report {
        part: Part { identity: [identity; 32], ..PART },
        ..report(9, 0, &[], all(&[1]))
    };
    assert_eq!(owner.told(at(0), node(1), of(1)), known(0));
    assert_eq!(owner.told(at(0), node(1), of(2)), known(0));
    assert!(matches!(owner.told(at(0), node(1), of(3)), Heard::Busy { .. }));
    assert_eq!(owner.told(at(0), node(2), of(2)), known(0));
}

/// A reporter that leaves an event out is found out.
#[test]
fn other_names_than_the_node_has_are_noticed() {
    let mut owner = filled(OwnerConfig::default());
    let told = |owner: &mut Owner, first, list: &[(u64, bool)], sum| {
        owner.told(at(1), node(1), summed(9, first, list, None, Some(sum)))
    };
    assert_eq!(told(&mut owner, 5, &[(4, false), (1, true)], sum(&[2, 3, 4])), known(7));
    // Another sum at another time says nothing.
    assert_eq!(told(&mut owner, 5, &[], sum(&[9])), known(7));
    assert_eq!(told(&mut owner, 7, &[], sum(&[2, 3])), Heard::Unknown);
    assert_eq!(owner.stats().unequal, 1);
    assert_eq!(owner.names_of(&PART, node(1)), None);
}

/// Members that say anything: no panic, every bound holds, and others' names stay as they are.
#[test]
fn lies() {
    let config = OwnerConfig { names_max: 200, parts_max: 3, ..OwnerConfig::default() };
    for seed in 0..30 {
        let mut random = protocol::random::Random::new(seed);
        let mut owner = owner(config.clone());
        assert_eq!(owner.told(at(0), node(0), report(1, 0, &[], all(&[1, 2, 50]))), known(0));
        for step in 0..2000u64 {
            let mut small = |n: usize| random.below(n) as u64;
            let list: Vec<(u64, bool)> =
                (0..small(6)).map(|_| (small(99), small(2) == 0)).collect();
            let (first, last) = (small(60) * small(2), 60 + small(60));
            let named: Vec<u64> = (first..last).filter(|n| n % 3 == step % 3).collect();
            let first_event = [small(9), small(99), u64::MAX - 9][small(3) as usize];
            let piece = (small(2) == 0).then(|| piece(first, last, &named)).flatten();
            let sum = (small(2) == 0).then(|| sum(&named));
            let mut lie = summed(small(2), first_event, &list, piece, sum);
            lie.part.identity = [small(5) as u8; 32];
            lie.part = if small(3) == 0 { lie.part } else { PART };
            if small(9) == 0 {
                lie.news = News::Gone;
            }
            // What cannot be on the wire cannot be told.
            let lie = Report::from_bytes(&lie.to_bytes()).expect("within its bounds");
            owner.told(at(step), node(1 + small(19) as u8), lie);
            if small(20) == 0 {
                owner.tick(at(step));
            }
            let stats = owner.stats();
            assert!(stats.names <= 200 && stats.parts <= 3 && stats.nodes <= 60, "{stats:?}");
            assert_eq!(owner.names_of(&PART, node(0)), Some(names(&[1, 2, 50])));
            let longest = query(&mut owner, &[1, 2, 50, 51]);
            assert!(longest.contains(&(node(0), 3)), "{longest:?}");
        }
    }
}
