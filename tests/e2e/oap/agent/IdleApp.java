package balancer.e2e;

/** The traced application: waits to be killed; the agent does the work. */
public final class IdleApp {
    private IdleApp() { }

    public static void main(String[] arguments) throws InterruptedException {
        Thread.currentThread().join();
    }
}
