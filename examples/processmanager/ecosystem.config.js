// pm2 start ecosystem.config.js. The numbers are milliseconds; the tests check them against the code's.
module.exports = {
  apps: [{
    name: 'processmanager',
    cwd: __dirname,
    script: './processmanager',
    interpreter: 'none', // a program, not a script for Node; it gets Node's IPC channel all the same
    exec_mode: 'fork',
    wait_ready: true, // pm2 start, restart and reload wait for "ready"
    listen_timeout: 20000, // but no longer than that; the service gives up after 15,000
    shutdown_with_message: true, // "shutdown" on the channel; without this PM2 sends SIGINT, which does the same
    kill_timeout: 30000, // until SIGKILL: more than SHUTDOWN_TIMEOUT; PM2's default is 1,600
    env: { SHUTDOWN_TIMEOUT: '20s' },
  }],
}
