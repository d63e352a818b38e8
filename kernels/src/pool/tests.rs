use super::*;
use std::sync::atomic::AtomicU32;

#[test]
fn each_task_runs_exactly_once() {
    for threads in [1, 2, 3, 8] {
        let pool = ThreadPool::new(threads);
        for tasks in [0, 1, 2, 3, 7, 64, if cfg!(miri) { 65 } else { 1000 }] {
            let counts: Vec<AtomicU32> = (0..tasks).map(|_| AtomicU32::new(0)).collect();
            pool.run(tasks, &|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{threads} {tasks}");
        }
    }
}

#[test]
fn many_regions_see_each_others_writes() {
    let pool = ThreadPool::new(4);
    let mut data = vec![0u64; 37];
    let rounds = if cfg!(miri) { 30 } else { 20_000 };
    for round in 0..rounds {
        pool.run_chunks(&mut data, 1 + (round % 5) as usize, |_, piece| {
            for x in piece {
                *x = x.wrapping_mul(3).wrapping_add(round);
            }
        });
    }
    let want = (0..rounds).fold(0u64, |x, r| x.wrapping_mul(3).wrapping_add(r));
    assert!(data.iter().all(|&x| x == want));
}

#[test]
fn regions_after_the_threads_have_parked() {
    let pool = ThreadPool::new(3);
    for _ in 0..ROUNDS {
        while !pool.shared.parked.iter().all(|p| p.0.load(Ordering::SeqCst)) {
            thread::yield_now();
        }
        let sum = AtomicUsize::new(0);
        pool.run(10, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }
}

#[test]
fn the_caller_parks_for_a_long_task_and_is_woken() {
    let pool = ThreadPool::new(2);
    let of_caller = thread::current().id();
    for _ in 0..ROUNDS {
        let begun = AtomicBool::new(false);
        pool.run(2, &|_| {
            if thread::current().id() == of_caller {
                // Lets the other thread take a task, so that the caller has to wait for it.
                while !begun.load(Ordering::Acquire) {
                    thread::yield_now();
                }
                return;
            }
            begun.store(true, Ordering::Release);
            while lock(&pool.shared.caller).is_none()
                || pool.shared.gate.0.load(Ordering::Acquire) & CALLER_PARKED == 0
            {
                thread::yield_now();
            }
        });
    }
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
    // A panic takes Miri seven seconds.
    let (threads, tasks): (&[_], &[_]) =
        if cfg!(miri) { (&[2], &[0, 9]) } else { (&[1, 2, 5], &[0, 1, 9]) };
    for &threads in threads {
        let pool = ThreadPool::new(threads);
        for &bad in tasks {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(10, &|i| assert!(i != bad, "task {i} failed"));
            }));
            let payload = outcome.expect_err("the panic must pass");
            let text = payload.downcast_ref::<String>().expect("a formatted message");
            assert_eq!(text, &format!("task {bad} failed"));
            let done = AtomicUsize::new(0);
            pool.run(10, &|_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 10);
        }
    }
}

#[test]
fn nested_regions_run_inline() {
    let pool = ThreadPool::new(3);
    let sum = AtomicUsize::new(0);
    pool.run(8, &|i| {
        let thread_of_task = thread::current().id();
        pool.run(8, &|j| {
            assert_eq!(thread::current().id(), thread_of_task);
            sum.fetch_add(i * j, Ordering::Relaxed);
        });
    });
    assert_eq!(sum.into_inner(), 28 * 28);
}

#[test]
fn concurrent_callers_take_turns() {
    let pool = ThreadPool::new(3);
    let total = AtomicUsize::new(0);
    let regions = if cfg!(miri) { 10 } else { 500 };
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..regions {
                    pool.run(6, &|i| {
                        total.fetch_add(i, Ordering::Relaxed);
                    });
                }
            });
        }
    });
    assert_eq!(total.into_inner(), 4 * regions * 15);
}

#[test]
fn run_chunks2_cuts_in_step() {
    let pool = ThreadPool::new(2);
    let (mut a, mut b) = (vec![0usize; 10], vec![0usize; 25]);
    pool.run_chunks2(&mut a, 2, &mut b, 5, |i, a, b| {
        a.fill(i + 1);
        b.fill(10 * (i + 1));
    });
    assert_eq!(a, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]);
    assert_eq!(&b[..6], [10, 10, 10, 10, 10, 20]);
}

#[test]
#[should_panic(expected = "number of pieces")]
fn run_chunks2_refuses_slices_that_do_not_match() {
    ThreadPool::new(1).run_chunks2(&mut [0u8; 4], 2, &mut [0u8; 9], 3, |_, _, _| {});
}

#[test]
fn dropping_joins_parked_and_spinning_threads() {
    for round in 0..ROUNDS {
        let pool = ThreadPool::new(4);
        if round % 2 == 0 {
            pool.run(4, &|_| {});
        }
        drop(pool);
    }
}

/// Miri is some thousand times slower than the CPU.
const ROUNDS: usize = if cfg!(miri) { 4 } else { 50 };
