//! Tasks that outlast their request, such as the attempt of a gateway whose client has left. A worker that drains waits for
//! them, until the master kills it at the end of `--drain-timeout`.

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;

use tokio::sync::Notify;

thread_local! {
    static RUNNING: Rc<Running> = Rc::default();
}

/// The tasks of this thread.
#[derive(Debug, Default)]
struct Running {
    count: Cell<usize>,
    one_ended: Notify,
}

/// Counts a task until it is dropped.
struct Counted(Rc<Running>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.count.set(self.0.count.get().saturating_sub(1));
        self.0.one_ended.notify_waiters();
    }
}

/// Runs a future as a task of this thread's event loop.
pub(crate) fn spawn(future: impl Future<Output = ()> + 'static) {
    let running = RUNNING.with(Rc::clone);
    running.count.set(running.count.get() + 1);
    let counted = Counted(running);
    tokio::task::spawn_local(async move {
        let _counted = counted;
        future.await;
    });
}

/// Returns when none of these tasks runs.
pub(crate) async fn ended() {
    let running = RUNNING.with(Rc::clone);
    loop {
        let one_ended = running.one_ended.notified();
        if running.count.get() == 0 {
            return;
        }
        one_ended.await;
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::task::Poll;

    use tokio::sync::oneshot;
    use tokio::task::LocalSet;

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn the_end_of_the_last_task_is_awaited() {
        let test = async {
            ended().await;
            let (first, second) = (oneshot::channel::<()>(), oneshot::channel::<()>());
            spawn(async { _ = first.1.await });
            spawn(async { _ = second.1.await });
            let mut all = Box::pin(ended());
            for end in [first.0, second.0] {
                let is_over = poll_fn(|context| Poll::Ready(all.as_mut().poll(context).is_ready())).await;
                assert!(!is_over);
                drop(end);
                tokio::task::yield_now().await;
            }
            all.await;
        };
        LocalSet::new().run_until(test).await;
    }
}
